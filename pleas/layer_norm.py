"""Scales and shifts of layer norms: between the parents' average and a closed form (decision 0009).

A layer norm divides by the spread of what it reads. Where two streams are averaged their spread shrinks, and the
norm stretches the average back to the parents' spread; but the layers behind it are fitted to the average of the
parents' normalised streams, which is smaller. Per unit, the scale and shift that map the one to the other are a
regression of two numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from pleas.layers import State
from pleas.moments import Moments
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
        return self.weight

    def rows(self, inputs: list[Tensor], states: list[dict[str, Tensor]]) -> Tensor:
        """For each unit what the merged network's norm will give before its scale, and what it should give after.

        inputs: of the parents, units aligned, (..., units)        returns (units, positions, 2)
        """
        shape = inputs[0].shape[-1:]
        plain = F.layer_norm((inputs[0] + inputs[1]) / 2, shape, None, None, self.eps)
        wanted = [
            F.layer_norm(x, shape, state[self.weight], state[self.bias], self.eps)
            for x, state in zip(inputs, states, strict=True)
        ]
        pair = [plain, (wanted[0] + wanted[1]) / 2]
        return torch.stack([x.reshape(-1, shape[0]).T for x in pair], -1)


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


def fit_layer_norm(
    norm: LayerNorm, moments: Moments, states: tuple[State, State], share: float, ridge: float
) -> Mapping[str, Tensor]:
    """Scale and shift, (units,) each: the parents' average at share 0, the closed form at share 1.

    moments: of `LayerNorm.rows`, (units, 2)        share: of the units that can be kept apart, those that are
    """
    weights, biases = ([state[name].double() for state in states] for name in (norm.weight, norm.bias))
    scale, shift = sum(weights) / 2, sum(biases) / 2
    mean, covariance = moments.mean, moments.covariance
    variance = covariance[:, 0, 0]
    damping = ridge * torch.where(variance.mean() > 0, variance.mean(), 1.0)
    fitted = (covariance[:, 0, 1] + damping * scale) / (variance + damping)
    scale = scale + share * (fitted - scale)
    shift = shift + share * (mean[:, 1] - fitted * mean[:, 0] - shift)
    return {norm.weight: scale, norm.bias: shift}
