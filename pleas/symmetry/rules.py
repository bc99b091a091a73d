"""What every op does to labels: a table from ATen op names to small functions.

A rule gets an Op (arguments by name, tensors replaced by their Val) and returns the Val of its result, or a list
of them. An op without a rule pins everything it reads, which is always sound, and is reported. Ops that torch
itself tags as pointwise need no entry. How to add a rule: docs/add_an_op.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pleas.symmetry.algebra import Algebra, anonymous
from pleas.symmetry.labels import Ledger, Shape, Val, positions

Result = Val | list[Val]


@dataclass
class Op:
    """One call in the graph, as a rule sees it."""

    node: fx.Node
    name: str  # "convolution", without namespace and overload
    args: dict[str, Any]  # by the schema's names, defaults filled in
    shapes: list[Shape]  # of the results
    algebra: Algebra

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def ledger(self) -> Ledger:
        return self.algebra.ledger

    @property
    def values(self) -> list[Val]:
        """All tensor arguments, those in lists included."""
        found: list[Val] = []
        for argument in self.args.values():
            found += [
                v
                for v in (argument if isinstance(argument, list | tuple) else [argument])
                if isinstance(v, Val)
            ]
        return found


Rule = Callable[[Op], Result]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table under the names of its ops."""

    def enter(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for the op {name}")
            RULES[name] = function
        return function

    return enter


def rule_for(target: Any) -> Rule | None:
    """The rule of an op overload, None if there is none."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = op_name(target)
    if name in RULES:
        return RULES[name]
    return pointwise if torch.Tag.pointwise in target.tags else None


def op_name(target: torch._ops.OpOverload) -> str:
    return target._schema.name.split("::")[1]


def supported_ops() -> dict[str, str]:
    """Every op with a rule of its own, and the first line of what the rule says."""
    first_line = {name: (function.__doc__ or "").strip().splitlines()[0] for name, function in RULES.items()}
    return dict(sorted(first_line.items()))


# element by element ------------------------------------------------------------------------------------------


@rule("clone", "_to_copy", "detach", "alias", "lift_fresh_copy", "contiguous", "copy", "where", "masked_fill")
@rule("_prelu_kernel", "native_dropout", "addcmul", "addcdiv", "lerp", "isin", "dropout")
def pointwise(op: Op) -> Result:
    """Element-wise with broadcasting: labels that meet in an element are related."""
    result = op.algebra.meet(op.values, op.shape)
    return result if len(op.shapes) == 1 else [result] * len(op.shapes)


@rule("full", "full_like", "zeros", "ones", "zeros_like", "ones_like", "empty", "empty_like", "scalar_tensor")
@rule("new_zeros", "new_ones", "new_full", "new_empty", "fill", "empty_permuted", "empty_strided")
def uniform(op: Op) -> Result:
    """The same number everywhere: no condition on anything."""
    return Val(op.shape)


@rule("_native_batch_norm_legit_no_training")
def batch_norm(op: Op) -> Result:
    """Per-channel affine map: four vectors meet dimension 1."""
    return [_with_channels(op, op["input"], "weight", "bias", "running_mean", "running_var"), *_empty(op)]


@rule("_native_batch_norm_legit", "_native_batch_norm_legit_functional")
def batch_norm_of_batch(op: Op) -> Result:
    """Normalised by its own statistics (weight standardisation): every dimension but 1 is averaged over."""
    value = op["input"]
    dims = [d for d in range(len(value.shape)) if d != 1]
    return [
        _with_channels(op, _normalised(op, value, dims, "batch statistics"), "weight", "bias"),
        *_empty(op),
    ]


@rule("native_layer_norm")
def layer_norm(op: Op) -> Result:
    """Normalised over the last dimensions, then scaled and shifted per position of these."""
    value, ndim = op["input"], len(op["input"].shape)
    dims = range(ndim - len(op["normalized_shape"]), ndim)
    value = _normalised(op, value, dims, "a LayerNorm averages over it")
    extra = [v for v in (op["weight"], op["bias"]) if v is not None]
    return [op.algebra.meet([value, *extra], op.shape), *_empty(op)]


@rule("native_group_norm")
def group_norm(op: Op) -> Result:
    """Normalised over the channels of each group and all positions."""
    value, groups = op["input"], op["group"]
    batch, channels, *space = value.shape
    split = op.algebra.reshaped(value, (batch, groups, channels // groups, *space))
    dims = range(2, len(split.shape))
    value = op.algebra.reshaped(_normalised(op, split, dims, "a GroupNorm averages over it"), op.shape)
    return [_with_channels(op, value, "weight", "bias"), *_empty(op)]


@rule("_softmax", "_log_softmax", "softmax", "_safe_softmax")
def softmax(op: Op) -> Result:
    """Each element meets a sum over `dim`."""
    return _normalised(op, op["self"], [op["dim"]], "a softmax runs over it")


def _normalised(op: Op, value: Val, dims: Any, reason: str) -> Val:
    """Elements meet a reduction over dims of their own tensor."""
    total = _reduced(op, value, dims, True, reason)
    return op.algebra.meet([value, total], value.shape)


def _with_channels(op: Op, value: Val, *names: str) -> Val:
    """Vectors meet dimension 1 of a value."""
    vectors = [op.args[name] for name in names if op.args.get(name) is not None]
    shape = (-1,) + (1,) * (len(value.shape) - 2)
    laid = [op.algebra.reshaped(v, (v.shape[0], *shape[1:])) for v in vectors]
    return op.algebra.meet([value, *laid], value.shape)


def _empty(op: Op) -> list[Val]:
    """Saved statistics that nobody reads."""
    return [anonymous(shape) for shape in op.shapes[1:]]


# reductions --------------------------------------------------------------------------------------------------


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "var_mean",
    "linalg_vector_norm",
    "prod",
    "logsumexp",
    "any",
    "all",
)
@rule("norm", "max", "min")
def reduction(op: Op) -> Result:
    """A symmetric reduction: what it runs over disappears, what it runs across becomes blocks."""
    value = op.args.get("self", op.args.get("x"))
    dims = op.args.get("dim")
    if op.name in ("max", "min") and dims is not None:
        return unlisted(op)  # also returns indices, which are positions
    if dims is None or dims == []:
        dims = list(range(len(value.shape)))
    dims = [dims] if isinstance(dims, int) else dims
    result = _reduced(op, value, dims, bool(op.args.get("keepdim")), f"{op.name} runs over it")
    return result if len(op.shapes) == 1 else [result] * len(op.shapes)


def _reduced(op: Op, value: Val, dims: Any, keepdim: bool, reason: str) -> Val:
    inside = {d % len(value.shape) for d in dims} if value.shape else set()
    op.ledger.mark([f for f in value.free if any(f.shape[d] > 1 for d in inside)], reason)
    return op.algebra.reduce(value, inside, keepdim)


# contractions ------------------------------------------------------------------------------------------------


@rule("linear")
def linear(op: Op) -> Result:
    """x (..., k) with W (o, k), summed over k, and a bias on o."""
    value, weight = op["input"], op["weight"]
    out, inner = weight.shape
    rows = op.algebra.reshaped(value, (*value.shape[:-1], 1, inner))
    result = _contract(op, [rows, weight], (*value.shape[:-1], out, inner))
    return op.algebra.meet([v for v in (result, op["bias"]) if v is not None], op.shape)


@rule("mm", "bmm", "addmm", "baddbmm", "mv", "dot")
def matrix_product(op: Op) -> Result:
    """(..., m, k) with (..., k, n), summed over k; a third argument is added."""
    left, right = [v for name, v in op.args.items() if isinstance(v, Val) and name in _FACTORS]
    if op.name in ("mv", "dot"):
        right = op.algebra.reshaped(right, (*right.shape, 1))
        left = left if op.name == "mv" else op.algebra.reshaped(left, (1, *left.shape))
    product = _matmul(op, left, right)
    product = op.algebra.reshaped(product, op.shape)
    added = [op["self"]] if op.name in ("addmm", "baddbmm") else []
    return op.algebra.meet([product, *added], op.shape)


_FACTORS = ("mat1", "mat2", "batch1", "batch2", "self", "vec", "tensor")


@rule("scaled_dot_product_attention")
def attention(op: Op) -> Result:
    """softmax(q k^T + mask) v, from its parts."""
    query, key, value, mask = op["query"], op["key"], op["value"], op["attn_mask"]
    scores = _matmul(op, query, op.algebra.transposed(key))
    scores = op.algebra.meet([v for v in (scores, mask) if v is not None], scores.shape)
    weights = _normalised(op, scores, [-1], "a softmax runs over it")
    return _matmul(op, weights, value)


def _matmul(op: Op, left: Val, right: Val) -> Val:
    *batch, rows, inner = left.shape
    *batch_right, _, cols = right.shape
    lead = tuple(torch.broadcast_shapes(tuple(batch), tuple(batch_right)))
    left = op.algebra.reshaped(left, (*batch, rows, 1, inner))
    right = op.algebra.transposed(right)
    right = op.algebra.reshaped(right, (*batch_right, 1, cols, inner))
    return _contract(op, [left, right], (*lead, rows, cols, inner))


def _contract(op: Op, factors: list[Val], shape: Shape) -> Val:
    return op.algebra.reduce(op.algebra.meet(factors, shape), [-1])


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
    result = _contract(op, [image, kernel], (batch, groups, outputs // groups, inputs // groups))
    spaced = algebra.reshaped(result, (batch, outputs, *(1,) * (len(op.shape) - 2)))
    return _with_channels(op, with_space(op, spaced), "bias")


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
    value = op.args.get("self", op.args.get("input"))
    result = with_space(op, space_mixed(op, value, 2))
    return result if len(op.shapes) == 1 else [result] * len(op.shapes)


@rule(
    "avg_pool1d", "adaptive_avg_pool1d", "max_pool1d_with_indices", "upsample_linear1d", "upsample_nearest1d"
)
def linear_in_space(op: Op) -> Result:
    """Pooling and resizing along one dimension."""
    result = with_space(op, space_mixed(op, op.args.get("self", op.args.get("input")), 1))
    return result if len(op.shapes) == 1 else [result] * len(op.shapes)


def unlisted(op: Op) -> Result:
    """The fallback: pin every unit the op reads; its results have fixed positions only."""
    for value in op.values:
        op.algebra.pin(value, f"{op.name} at {op.node.name} has no symmetry rule")
    results = [anonymous(shape) for shape in op.shapes]
    return results[0] if len(results) == 1 else results
