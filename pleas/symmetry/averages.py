"""Rules of reductions and of normalisations, in which every element meets a reduction of its own tensor."""

from __future__ import annotations

from typing import Any

from pleas.symmetry.algebra import anonymous
from pleas.symmetry.labels import Val
from pleas.symmetry.owners import dims_with_units, is_owned
from pleas.symmetry.rules import Op, Result, rule, unlisted


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
    value: Any = op.args.get("self", op.args.get("x"))
    dims = op.args.get("dim")
    if op.name in ("max", "min") and dims is not None:
        return unlisted(op)  # also returns indices, which are positions
    if dims is None or dims == []:
        dims = list(range(len(value.shape)))
    dims = [dims] if isinstance(dims, int) else dims
    keepdim = bool(op.args.get("keepdim"))
    carriers = dims_with_units(value, dims)
    owned = keepdim and len(carriers) == 1 and is_owned(op.node, carriers[0] - len(value.shape))
    result = reduced(op, value, dims, keepdim, "" if owned else f"{op.name} runs over it")
    return result if len(op.shapes) == 1 else [result] * len(op.shapes)


def reduced(op: Op, value: Val, dims: Any, keepdim: bool, reason: str) -> Val:
    """Reduce over dims; `reason` (unless empty) is why units inside them cannot be kept partly apart."""
    inside = {d % len(value.shape) for d in dims} if value.shape else set()
    if reason:
        op.ledger.mark([f for f in value.free if any(f.shape[d] > 1 for d in inside)], reason)
    return op.algebra.reduce(value, inside, keepdim)


@rule("_native_batch_norm_legit_no_training")
def batch_norm(op: Op) -> Result:
    """Per-channel affine map: four vectors meet dimension 1."""
    return [with_channels(op, op["input"], "weight", "bias", "running_mean", "running_var"), *_empty(op)]


@rule("_native_batch_norm_legit", "_native_batch_norm_legit_functional")
def batch_norm_of_batch(op: Op) -> Result:
    """Normalised by its own statistics (weight standardisation): every dimension but 1 is averaged over."""
    value = op["input"]
    dims = [d for d in range(len(value.shape)) if d != 1]
    return [
        with_channels(op, normalised(op, value, dims, "batch statistics"), "weight", "bias"),
        *_empty(op),
    ]


@rule("native_layer_norm")
def layer_norm(op: Op) -> Result:
    """Normalised over the last dimensions, then scaled and shifted per position of these."""
    value, ndim = op["input"], len(op["input"].shape)
    dims = range(ndim - len(op["normalized_shape"]), ndim)
    # Over one dimension of units every parent has its own view, whose mean and variance it keeps.
    reason = "a LayerNorm averages over it" if len(dims_with_units(value, dims)) > 1 else ""
    value = normalised(op, value, dims, reason)
    extra = [v for v in (op["weight"], op["bias"]) if v is not None]
    return [op.algebra.meet([value, *extra], op.shape), *_empty(op)]


@rule("native_group_norm")
def group_norm(op: Op) -> Result:
    """Normalised over the channels of each group and all positions."""
    value, groups = op["input"], op["group"]
    batch, channels, *space = value.shape
    split = op.algebra.reshaped(value, (batch, groups, channels // groups, *space))
    dims = range(2, len(split.shape))
    owned = groups == 1 and dims_with_units(split, dims) == [2]
    reason = "" if owned else "a GroupNorm averages over it"
    value = op.algebra.reshaped(normalised(op, split, dims, reason), op.shape)
    return [with_channels(op, value, "weight", "bias"), *_empty(op)]


@rule("_softmax", "_log_softmax", "softmax", "_safe_softmax")
def softmax(op: Op) -> Result:
    """Each element meets a sum over `dim`."""
    return normalised(op, op["self"], [op["dim"]], "a softmax runs over it")


def normalised(op: Op, value: Val, dims: Any, reason: str) -> Val:
    """Elements meet a reduction over dims of their own tensor."""
    total = reduced(op, value, dims, True, reason)
    return op.algebra.meet([value, total], value.shape)


def with_channels(op: Op, value: Val, *names: str) -> Val:
    """Vectors meet dimension 1 of a value."""
    vectors = [op.args[name] for name in names if op.args.get(name) is not None]
    shape = (-1,) + (1,) * (len(value.shape) - 2)
    laid = [op.algebra.reshaped(v, (v.shape[0], *shape[1:])) for v in vectors]
    return op.algebra.meet([value, *laid], value.shape)


def _empty(op: Op) -> list[Val]:
    """Saved statistics that nobody reads."""
    return [anonymous(shape) for shape in op.shapes[1:]]
