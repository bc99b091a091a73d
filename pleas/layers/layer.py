"""The canonical layer: every weight layer is `Y = X W^T + b` on rows `X` (positions, d_in).

**Layout, used by every file that follows.** A row of a layer is one image at one position. A convolution is
unfolded with the kernel position ("tap") outermost, so `d_in = taps * channels` and column `tap * channels +
c` is channel `c` under that tap; a linear layer has one tap. A grouped convolution has one such problem per
group, with `channels / groups` channels each. Batch norm in evaluation mode is affine and is folded into the
layer before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from pleas.errors import InputError
from pleas.symmetry import Program

State = Mapping[str, Tensor]

CONVOLUTION = torch.ops.aten.convolution.default
LINEAR = torch.ops.aten.linear.default
BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
MAX_INPUTS = (
    6000  # d_in of a linear layer above which its rows are kept: its Gram matrix would take 288 MB and more
)


@dataclass(frozen=True)
class BatchNorm:
    """Batch norm in evaluation mode: `y = scale * x + shift` per unit, with `scale = weight / sqrt(var +
    eps)`."""

    node: str
    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float

    @property
    def name(self) -> str:
        return self.mean.removesuffix(".running_mean")

    def affine(self, state: State) -> tuple[Tensor, Tensor]:
        """Scale and shift, (units,) each, float64."""
        mean, var = state[self.mean].double(), state[self.var].double()
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * state[self.weight].double()
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + state[self.bias].double()
        return scale, shift

    def unfolded(self, scale: Tensor, shift: Tensor, state: State) -> Mapping[str, Tensor]:
        """The tensors that give this scale and shift beside the running statistics of `state`.

        Raises InputError for a batch norm without affine parameters, which has nothing to put them in.
        """
        if self.weight is None or self.bias is None:
            raise InputError(
                f"batch norm '{self.name}' has no affine parameters and stands alone: it cannot be merged"
            )
        spread = (state[self.var].to(scale) + self.eps).sqrt()
        return {self.weight: scale * spread, self.bias: shift + scale * state[self.mean].to(scale)}


@dataclass(frozen=True)
class Layer:
    """A weight tensor used by one or several convolutions or linear maps of the graph.

    `norm` is the batch norm that alone reads this layer's output, if there is one: it is folded into the
    layer.
    """

    name: str
    nodes: tuple[str, ...]
    weight: str
    bias: str | None
    taps: int
    channels: int
    out_units: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    norm: BatchNorm | None = None

    @property
    def is_convolution(self) -> bool:
        return bool(self.kernel)

    @property
    def d_in(self) -> int:
        """Inputs of one output unit."""
        return self.taps * self.channels // self.groups

    def matrix(self, state: State) -> tuple[Tensor, Tensor]:
        """Weight (out_units, d_in) and bias (out_units,) in the canonical layout, batch norm folded in,
        float64."""
        weight = flatten_weight(state[self.weight].double())
        bias = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        if self.bias is not None:
            bias = state[self.bias].double()
        if self.norm is not None:
            scale, shift = self.norm.affine(state)
            weight, bias = weight * scale[:, None], bias * scale + shift
        return weight, bias


def flatten_weight(weight: Tensor) -> Tensor:
    """(out, channels, *kernel) -> (out, taps * channels), tap outermost."""
    return weight.movedim(1, -1).flatten(1)


def unflatten_weight(matrix: Tensor, kernel: Sequence[int]) -> Tensor:
    """Inverse of `flatten_weight`: (out, taps * channels) -> (out, channels, *kernel)."""
    return matrix.unflatten(1, (*kernel, -1)).movedim(-1, 1).contiguous() if kernel else matrix


def find_layers(program: Program) -> tuple[Layer, ...]:
    """The program's weight layers in graph order. Weights that are themselves computed (weight
    standardisation), and
    transposed convolutions, are not layers: they are merged by matched averaging and the report says so."""
    uses: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if is_layer(node):
            uses.setdefault(str(node.args[1].target), []).append(node)
    return tuple(_layer(weight, nodes) for weight, nodes in uses.items() if _consistent(nodes))


def find_norms(program: Program) -> tuple[BatchNorm, ...]:
    """Batch norms that stand alone (before a convolution, as in pre-activation networks): folded into no
    layer."""
    folded = {layer.norm.node for layer in find_layers(program) if layer.norm is not None}
    nodes = [node for node in program.graph.nodes if node.target is BATCH_NORM and node.name not in folded]
    return tuple(norm for norm in map(batch_norm, nodes) if norm is not None)


def is_layer(node: fx.Node) -> bool:
    """A convolution or linear map whose weight is a parameter."""
    if node.target not in (CONVOLUTION, LINEAR):
        return False
    args: list[Any] = list(node.args)
    weight, bias = args[1], args[2] if len(args) > 2 else None
    direct = isinstance(weight, fx.Node) and weight.op == "get_attr"
    direct = direct and (bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr"))
    transposed = node.target is CONVOLUTION and bool(args[6])
    return direct and not transposed


def _consistent(nodes: Sequence[fx.Node]) -> bool:
    """A weight shared by several nodes is one layer only if they all apply it with one geometry and bias."""
    return len({str(node.args[2:]) for node in nodes}) == 1


def _layer(weight: str, nodes: Sequence[fx.Node]) -> Layer:
    node = nodes[0]
    args: list[Any] = list(node.args)
    shape = args[1].meta["val"].shape
    bias = args[2] if len(args) > 2 else None
    common: dict[str, Any] = {
        "name": weight.removesuffix(".weight"),
        "nodes": tuple(n.name for n in nodes),
        "weight": weight,
        "bias": str(bias.target) if isinstance(bias, fx.Node) else None,
        "out_units": int(shape[0]),
        "norm": following_norm(node) if len(nodes) == 1 else None,
    }
    if node.target is LINEAR:
        return Layer(**common, taps=1, channels=int(shape[1]))
    stride, padding, dilation, groups = args[3], args[4], args[5], args[8]
    kernel = tuple(int(k) for k in shape[2:])
    return Layer(
        **common,
        taps=int(torch.Size(kernel).numel()),
        channels=int(shape[1]) * groups,
        groups=groups,
        kernel=kernel,
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
    )


def following_norm(node: fx.Node) -> BatchNorm | None:
    """The batch norm that is the only reader of this node, if its statistics are parameters of the model."""
    users = list(node.users)
    if node.target is LINEAR and node.meta["val"].dim() != 2:
        return None  # batch norm runs over dimension 1, which holds positions there
    if len(users) != 1 or users[0].target is not BATCH_NORM or users[0].args[0] is not node:
        return None
    return batch_norm(users[0])


def batch_norm(node: fx.Node) -> BatchNorm | None:
    """Read an evaluation-mode batch norm node; None when one of its vectors is computed rather than
    stored."""
    names = [
        arg.target if isinstance(arg, fx.Node) and arg.op == "get_attr" else arg for arg in node.args[1:5]
    ]
    if any(isinstance(name, fx.Node) for name in names):
        return None
    weight, bias, mean, var = names
    return BatchNorm(node.name, weight, bias, str(mean), str(var), float(node.args[6]))  # type: ignore[arg-type]


def batch_dim(node: fx.Node) -> int:
    """The dimension of a value that grows with the batch: 1 where tokens come first, 0 where none is known to."""
    shape = node.meta["val"].shape
    return next((d for d, size in enumerate(shape) if not isinstance(size, int)), 0)


def layer_rows(layer: Layer, inputs: Tensor, positions: Tensor | None) -> Tensor:
    """Input rows of a layer at chosen output positions, in the canonical layout.

    inputs:    (N, channels, *spatial) for a convolution, (N, ..., channels) for a linear layer
    positions: (N, P) flat output positions of every image, or None for all
    Returns (groups, N * P, d_in).
    """
    if not layer.is_convolution:
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        if positions is not None:
            rows = rows.gather(1, positions[:, :, None].expand(-1, -1, rows.shape[-1]))
        return rows.reshape(1, -1, rows.shape[-1])
    patches = _patches(layer, inputs, positions)  # (rows, taps, channels)
    grouped = patches.unflatten(2, (layer.groups, -1)).movedim(2, 0)
    return grouped.reshape(layer.groups, len(patches), layer.d_in)


def _patches(layer: Layer, inputs: Tensor, positions: Tensor | None) -> Tensor:
    """(rows, taps, channels): what the kernel sees at each chosen output position."""
    count = len(inputs)
    pad = [amount for p in reversed(layer.padding) for amount in (p, p)]
    padded = F.pad(inputs, pad) if any(pad) else inputs
    extents = output_extents(layer, inputs.shape[2:])
    if positions is None:
        total = int(torch.Size(extents).numel())
        positions = torch.arange(total, device=inputs.device).expand(count, total)
    coordinates = _unravelled(positions, extents)
    taps = _unravelled(torch.arange(layer.taps, device=inputs.device), layer.kernel)
    # One flat spatial index per (image, position, tap): on channels-last memory a gather copies whole vectors.
    flat = torch.zeros((count, positions.shape[1], layer.taps), dtype=torch.int64, device=inputs.device)
    for axis, size in enumerate(padded.shape[2:]):
        start = coordinates[axis][:, :, None] * layer.stride[axis]
        flat = flat * size + start + taps[axis] * layer.dilation[axis]
    area = int(padded.shape[2:].numel())
    flat = flat + torch.arange(count, device=inputs.device)[:, None, None] * area
    channels_last = padded.flatten(2).transpose(1, 2).reshape(count * area, -1)
    return channels_last.index_select(0, flat.flatten()).view(-1, layer.taps, channels_last.shape[1])


def _unravelled(flat: Tensor, extents: Sequence[int]) -> list[Tensor]:
    """Coordinates of flat indices; torch.unravel_index makes a CPU wait for the GPU, once for every call."""
    found = []
    for size in reversed(extents):
        found.append(flat % size)
        flat = flat.div(size, rounding_mode="floor")
    return found[::-1]


def output_extents(layer: Layer, spatial: Sequence[int]) -> tuple[int, ...]:
    """Spatial size of a convolution's output."""
    return tuple(
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip(
            spatial, layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True
        )
    )


def is_wide(layer: Layer) -> bool:
    """A linear layer whose rows are kept. Convolutions always have a Gram matrix: they have many rows per image."""
    return not layer.is_convolution and layer.d_in > MAX_INPUTS


def has_intercept(layer: Layer) -> bool:
    """Whether the layer can add a constant: by its own bias or by the batch norm behind it."""
    return layer.bias is not None or layer.norm is not None
