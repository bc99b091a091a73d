"""A walk of the merged network through the graph, all images at every node; tensors are set when it needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from pleas.comparators.comparator import State
from pleas.comparators.repair import merged_inputs
from pleas.evidence import Evidence
from pleas.layers.layer import BATCH_NORM, batch_norm
from pleas.symmetry import execute


class Walk:
    """Every batch runs as if it were a parent, in lock step. `reach` sees a node before it is run and may set tensors.

    state: the network's tensors under the names of the graph; with separate heads those of the first parent
    norms: whether batch norms take the statistics of what comes to them
    """

    def __init__(self, evidence: Evidence, state: State, *, norms: bool) -> None:
        self.evidence, self.norms = evidence, norms
        self.chunks = list(merged_inputs(evidence))
        self.starts = [0]
        for chunk in self.chunks:
            self.starts.append(self.starts[-1] + len(chunk))
        program, where = evidence.parents.symmetry.program, self.chunks[0].device
        first = evidence.states[0]
        whole = {**program.constants, **first}
        whole |= {name: value for name, value in state.items() if value.shape == first[name].shape}
        self.state = {name: value.to(where) for name, value in whole.items()}
        self.found: dict[str, Tensor] = {}

    def go(self) -> dict[str, Tensor]:
        """The tensors that were set."""
        graph = self.evidence.parents.symmetry.program.graph
        with torch.no_grad():
            execute(graph, [self.state] * len(self.chunks), self.chunks, self._visit)
        return self.found

    def reach(self, node: fx.Node, args: list[tuple[Any, ...]]) -> None:
        """Called with the arguments of every batch."""

    def set(self, name: str, value: Tensor) -> None:
        self.found[name] = self.state[name] = value.to(self.state[name])

    def _visit(self, node: fx.Node, args: list[tuple[Any, ...]], _: list[dict[str, Any]]) -> None:
        self.reach(node, args)
        norm = batch_norm(node) if node.target is BATCH_NORM and self.norms else None
        if norm is not None:
            values = torch.cat([arguments[0] for arguments in args])
            variance, mean = torch.var_mean(values, [dim for dim in range(values.dim()) if dim != 1])
            self.set(norm.mean, mean)
            self.set(norm.var, variance)
        # `execute` looked the tensors up before it asked: what was set now has to reach this node too.
        names = [x.target if isinstance(x, fx.Node) and x.op == "get_attr" else None for x in node.args]
        for number, arguments in enumerate(args):
            args[number] = tuple(
                self.state[str(name)] if name in self.found else value
                for name, value in zip(names, arguments, strict=True)
            )
