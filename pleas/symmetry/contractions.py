"""Rules of contractions: a product of two tensors in a common index space, summed over one of its dimensions.

Pooling and resizing are here too: like a convolution, they sum over positions in space.
"""

from __future__ import annotations

from typing import Any

import torch

from pleas.symmetry.averages import normalised, reduced, with_channels
from pleas.symmetry.labels import BILINEAR, Shape, Val, positions
from pleas.symmetry.rules import Op, Result, rule


@rule("linear")
def linear(op: Op) -> Result:
    """x (..., k) with W (o, k), summed over k, and a bias on o."""
    value, weight = op["input"], op["weight"]
    out, inner = weight.shape
    rows = op.algebra.reshaped(value, (*value.shape[:-1], 1, inner))
    bilinear = op.dynamic.issuperset(("input", "weight"))
    result = _contract(op, [rows, weight], (*value.shape[:-1], out, inner), bilinear)
    return op.algebra.meet([v for v in (result, op["bias"]) if v is not None], op.shape)


@rule("mm", "bmm", "addmm", "baddbmm", "mv", "dot")
def matrix_product(op: Op) -> Result:
    """(..., m, k) with (..., k, n), summed over k; addmm and baddbmm add a third argument."""
    names = _FACTORS[op.name]
    left, right = (op[name] for name in names)
    if op.name == "dot":
        left = op.algebra.reshaped(left, (1, *left.shape))
    if op.name in ("mv", "dot"):
        right = op.algebra.reshaped(right, (*right.shape, 1))
    product = op.algebra.reshaped(_matmul(op, left, right, op.dynamic.issuperset(names)), op.shape)
    return op.algebra.meet(
        [product, op["self"]] if op.name.startswith(("add", "badd")) else [product], op.shape
    )


_FACTORS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
}


@rule("scaled_dot_product_attention")
def attention(op: Op) -> Result:
    """softmax(q k^T + mask) v, from its parts."""
    query, key, value, mask = op["query"], op["key"], op["value"], op["attn_mask"]
    scores = _matmul(op, query, op.algebra.transposed(key), op.dynamic.issuperset(("query", "key")))
    scores = op.algebra.meet([v for v in (scores, mask) if v is not None], scores.shape)
    weights = normalised(op, scores, [-1], "a softmax runs over it")
    return _matmul(op, weights, value, "value" in op.dynamic)


def _matmul(op: Op, left: Val, right: Val, bilinear: bool) -> Val:
    *batch, rows, inner = left.shape
    *batch_right, _, cols = right.shape
    lead = tuple(torch.broadcast_shapes(tuple(batch), tuple(batch_right)))
    left = op.algebra.reshaped(left, (*batch, rows, 1, inner))
    right = op.algebra.transposed(right)
    right = op.algebra.reshaped(right, (*batch_right, 1, cols, inner))
    return _contract(op, [left, right], (*lead, rows, cols, inner), bilinear)


def _contract(op: Op, factors: list[Val], shape: Shape, bilinear: bool) -> Val:
    """The product of the factors, summed over the last dimension."""
    product = op.algebra.meet(factors, shape)
    return reduced(op, product, [-1], False, BILINEAR if bilinear else "")


@rule("convolution")
def convolution(op: Op) -> Result:
    """Groups g, outputs o, inputs c: x (n, g, c) with W (g, o, c), summed over c; positions in space are fixed."""
    algebra, groups = op.algebra, op["groups"]
    image = space_mixed(op, op["input"], len(op["input"].shape) - 2)
    kernel = space_mixed(op, op["weight"], len(op["weight"].shape) - 2)
    batch, inputs = image.shape[:2]
    outputs = op.shape[1]
    image = algebra.reshaped(image, (batch, groups, 1, inputs // groups))
    if op["transposed"]:
        kernel = algebra.reshaped(kernel, (groups, inputs // groups, outputs // groups))
        kernel = algebra.transposed(kernel)
    else:
        kernel = algebra.reshaped(kernel, (groups, outputs // groups, inputs // groups))
    shape = (batch, groups, outputs // groups, inputs // groups)
    result = _contract(op, [image, kernel], shape, op.dynamic.issuperset(("input", "weight")))
    spaced = algebra.reshaped(result, (batch, outputs, *(1,) * (len(op.shape) - 2)))
    return with_channels(op, with_space(op, spaced), "bias")


def space_mixed(op: Op, value: Val, space: int) -> Val:
    """Positions of the last `space` dimensions are told apart, then summed over (dimensions of size 1 stay)."""
    ndim = len(value.shape)
    dims = range(ndim - space, ndim)
    places = Val(value.shape, [], positions(value.shape, dims))
    return op.algebra.reduce(op.algebra.meet([value, places], value.shape), dims, keepdim=True)


def with_space(op: Op, value: Val) -> Val:
    """Give a result new positions on the trailing dimensions that `value` has with size 1."""
    dims = [d for d, size in enumerate(value.shape) if size == 1 and op.shape[d] > 1]
    return Val(op.shape, value.free, [*value.fixed, *positions(op.shape, dims)])


@rule(
    "max_pool2d_with_indices",
    "avg_pool2d",
    "_adaptive_avg_pool2d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
)
@rule(
    "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "max_pool2d"
)
@rule("_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "reflection_pad2d", "replication_pad2d")
def planar(op: Op) -> Result:
    """Pooling and resizing: mixes height and width, acts on every channel alike."""
    value: Any = op.args.get("self", op.args.get("input"))
    result = with_space(op, space_mixed(op, value, 2))
    return result if len(op.shapes) == 1 else [result] * len(op.shapes)


@rule(
    "avg_pool1d", "adaptive_avg_pool1d", "max_pool1d_with_indices", "upsample_linear1d", "upsample_nearest1d"
)
def linear_in_space(op: Op) -> Result:
    """Pooling and resizing along one dimension."""
    value: Any = op.args.get("self", op.args.get("input"))
    result = with_space(op, space_mixed(op, value, 1))
    return result if len(op.shapes) == 1 else [result] * len(op.shapes)
