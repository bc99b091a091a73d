"""Matching inner activations: what the merged network's units compute, beside what its parents' units do.

A merged unit stands for one unit of each parent that owns it, so its target, the mean over its owners, is known unit
by unit, with no projection to learn. What is compared is the input of a few layers, evenly spread over the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pleas.errors import InputError
from pleas.evidence import Evidence
from pleas.layers.layer import Layer
from pleas.network.average import mean_of_owners
from pleas.network.widen import Layouts
from pleas.parents import Parents
from pleas.plan.layout import Layout
from pleas.plan.plan import Plan
from pleas.symmetry import execute

STAGES = 4
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class _Stage:
    layer: Layer
    units: Layout  # of the layer's input

    @property
    def dim(self) -> int:
        return 1 if self.layer.is_convolution else -1


class Features:
    """Which inner activations of a merged network are compared, and with what of its parents.

    evidence, plan: those of the merge        stages: how many layers' inputs are compared
    """

    def __init__(self, evidence: Evidence, plan: Plan, stages: int = STAGES) -> None:
        parents = evidence.parents
        layouts = Layouts(parents.symmetry, plan.classes, parents.count)
        chosen = feature_layers(parents, stages)
        self.stages = tuple(_Stage(layer, layouts.axis(layer.weight, 1)) for layer in chosen)
        self._graph = parents.symmetry.program.graph
        self._states = list(evidence.states)

    def to(self, device: torch.device) -> Features:
        """Itself, with the parents' tensors on `device`."""
        self._states = [{name: value.to(device) for name, value in state.items()} for state in self._states]
        return self

    @torch.no_grad()
    def targets(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(every parent's outputs, what every stage's units should be); inputs: every parent's."""
        seen: dict[str, list[Tensor]] = {}

        def visit(node: fx.Node, args: list[tuple], _: list[dict]) -> None:
            seen[node.name] = [arguments[0] for arguments in args] if node.name in wanted else []

        wanted = {stage.layer.nodes[0] for stage in self.stages}
        outputs = execute(self._graph, self._states, inputs, visit)
        return outputs, [_mixed(stage, seen[stage.layer.nodes[0]]) for stage in self.stages]

    def distance(self, found: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Mean over stages of the squared error, relative to the target's variance."""
        losses = [
            (x.float() - t).square().mean() / t.var().clamp_min(torch.finfo(t.dtype).tiny)
            for x, t in zip(found, targets, strict=True)
        ]
        return torch.stack(losses).mean()

    def run(self, network: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(the merged network's output, every stage's activation)."""
        if isinstance(network, fx.GraphModule):
            listener = _Listener(network, [stage.layer for stage in self.stages])
            return listener.run(x), listener.found
        found: dict[str, Tensor] = {}

        def listen(name: str) -> Callable[..., None]:
            return lambda _, inputs: found.update({name: inputs[0]})

        handles = [
            network.get_submodule(stage.layer.name).register_forward_pre_hook(listen(stage.layer.name))
            for stage in self.stages
        ]
        try:
            output = network(x)
        finally:
            for handle in handles:
                handle.remove()
        return output, [found[stage.layer.name] for stage in self.stages]


def feature_layers(parents: Parents, stages: int = STAGES) -> list[Layer]:
    """The layers of the parents whose inputs are compared; raises InputError where they have none that can be."""
    modules = dict(parents.modules[0].named_modules())
    plain = [
        layer
        for layer in parents.layers
        if len(layer.nodes) == 1 and layer.groups == 1 and isinstance(modules.get(layer.name), _LAYERS)
    ][1:]  # the first reads the image
    if not plain:
        raise InputError(
            "features cannot be matched: beyond the first layer none is a plain torch.nn convolution or linear "
            "layer. Leave feature_weight at 0"
        )
    count = min(stages, len(plain))
    return [plain[(i + 1) * len(plain) // count - 1] for i in range(count)]


def _mixed(stage: _Stage, values: Sequence[Tensor]) -> Tensor:
    """Merged units' targets from all parents' aligned values."""
    return mean_of_owners(values, {stage.dim % values[0].dim(): stage.units})


class _Listener(fx.Interpreter):
    """Runs a merged network and keeps what the named layers read."""

    def __init__(self, network: fx.GraphModule, layers: Sequence[Layer]) -> None:
        super().__init__(network)
        self._readers = {_reader(network, layer): i for i, layer in enumerate(layers)}
        self.found: list[Tensor] = [torch.empty(0)] * len(layers)

    def run_node(self, n: fx.Node) -> object:
        if n in self._readers:
            source = n.args[0]
            assert isinstance(source, fx.Node)
            self.found[self._readers[n]] = self.env[source]
        return super().run_node(n)


def _reader(network: fx.GraphModule, layer: Layer) -> fx.Node:
    """The node that applies `layer`: a call of its block module, or an op that reads its weight."""
    for node in network.graph.nodes:
        if node.op == "call_module" and node.target == layer.name:
            return node
        weight = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target == layer.weight:
            return node
    raise AssertionError(f"the merged network does not apply {layer.name}")
