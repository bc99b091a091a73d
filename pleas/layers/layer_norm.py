"""Layer norms whose scale and shift are parameters of their own: per unit they are a regression of two numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pleas.layers.layer import State
from pleas.symmetry import Program

_LAYER_NORM = torch.ops.aten.native_layer_norm.default


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm over the last dimension whose scale and shift are parameters of its own."""

    node: str
    weight: str
    bias: str
    eps: float

    @property
    def name(self) -> str:
        return self.weight.removesuffix(".weight")

    def affine(self, state: State) -> tuple[Tensor, Tensor]:
        """Scale and shift, (units,) each, float64."""
        return state[self.weight].double(), state[self.bias].double()

    def unfolded(self, scale: Tensor, shift: Tensor, state: State) -> Mapping[str, Tensor]:
        """The tensors that give this scale and shift."""
        return {self.weight: scale, self.bias: shift}


def find_layer_norms(program: Program) -> tuple[LayerNorm, ...]:
    """Those that stand once in the graph; others are merged by matched averaging alone."""
    nodes = [node for node in program.graph.nodes if node.target is _LAYER_NORM]
    found = [norm for norm in map(_layer_norm, nodes) if norm is not None]
    uses = Counter(name for norm in found for name in (norm.weight, norm.bias))
    return tuple(norm for norm in found if uses[norm.weight] == uses[norm.bias] == 1)


def _layer_norm(node: fx.Node) -> LayerNorm | None:
    _, shape, weight, bias, eps = node.args
    stored = all(isinstance(x, fx.Node) and x.op == "get_attr" for x in (weight, bias))
    if not stored or len(shape) != 1:  # type: ignore[arg-type]
        return None
    return LayerNorm(node.name, str(weight.target), str(bias.target), float(eps))  # type: ignore[union-attr,arg-type]
