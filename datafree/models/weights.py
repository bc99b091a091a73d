"""From what a checkpoint holds to a model's weights: which entry, under which names, in which numbers.

Nothing is guessed in silence: everything that was chosen, stripped, dropped or converted is one sentence in the notes.
"""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from datafree.errors import UsageError
from datafree.models.checkpoint_files import read_checkpoint

State = Mapping[str, Tensor]

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of wrappers: DataParallel, torch.compile, Lightning
_WRAPPERS = re.compile(r"(?<=\.)(?:module|_orig_mod)\.")  # the same, around a part of the network
COUNTERS = ("total_ops", "total_params")  # left in the model by tools that count operations
_BATCHES = "num_batches_tracked"  # counted while training; evaluation never reads it
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_DEEPEST = 3  # dicts in dicts in which a state dict is looked for
_LISTED = 6


def load_weights(
    path: Path, key: str | None = None, model: nn.Module | None = None
) -> tuple[State, tuple[str, ...]]:
    """The state dict in a checkpoint file, and one sentence for everything that was chosen on the way.

    key:   which entry, where the file holds several: "model_ema", or "ema.state_dict" for one inside another
    model: decides between several entries where one alone has its tensors
    Raises UsageError for a file that cannot be read (see `read_checkpoint`), that holds no state dict, or several.
    """
    content = read_checkpoint(path)
    found = dict(_states(content))
    if key is not None:
        if key not in found:
            known = [name for name in found if name]
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = (
                f"it has {_listing(map(repr, known))}"
                if known
                else "the file itself is one state dict: remove it"
            )
            raise UsageError(
                f"weights_key: {path} has no state dict under {key!r}{hint} ({listed})", "weights_key"
            )
        return found[key], (f"{path.name}: the state dict under {key!r} was taken, as weights_key says",)
    if not found:
        raise UsageError(_nothing(content, path))
    fitting = [name for name in found if model is None or _fits(found[name], model)]
    chosen = fitting if len(fitting) == 1 else list(found)
    if len(chosen) > 1:
        listed = ", ".join(f"{name!r} ({len(found[name])} tensors)" for name in found)
        raise UsageError(
            f"{path} holds several state dicts: {listed}. Say which one to take, for example `weights_key: {chosen[0]}`"
        )
    name, notes = chosen[0], []
    if name:
        notes.append(f"{path.name}: the state dict stood under {name!r}")
    if len(found) > 1:
        others = ", ".join(repr(other) for other in found if other != name)
        notes.append(f"{path.name}: {others} in the same file does not fit the model and was left")
    if not name and isinstance(content, Mapping) and len(found[name]) < len(content):
        rest = [str(other) for other in content if other not in found[name]]
        notes.append(f"{path.name}: what is no tensor was left: {_listing(rest)}")
    return found[name], tuple(notes)


def load_into(model: nn.Module, state: State, source: str) -> tuple[str, ...]:
    """Copy `state` into `model`, every tensor or none; returns notes.

    Prefixes of wrappers are stripped where the model lacks them, counters dropped, and the model's own load hooks
    translate old names. Raises UsageError listing keys that are missing, unexpected or of another shape, numbers that
    are no weights (integers, 8-bit floats, ...) and tensors with NaN or infinity. `num_batches_tracked` may be
    missing or superfluous: evaluation does not read it.
    """
    own = model.state_dict()
    packed = [f"{key} ({_kind(value)})" for key, value in state.items() if not _is_plain(value)]
    if packed:
        raise UsageError(_no_weights(source, packed))
    state, notes = rename(state, own, source)
    problems, absent = _try(model, state, own)
    if problems:
        raise UsageError(
            f"the weights in {source} do not fit the model; {'; '.join(problems)}. "
            "Check the model reference and its arguments (number of classes, width, depth)"
        )
    state, converted = _converted(state, own, source)
    check_finite(state, source)
    if absent:
        notes.append(f"{len(absent)} {_BATCHES} counters are absent from the file: evaluation ignores them")
    with torch.no_grad():
        model.load_state_dict(dict(state), strict=False)
    return (*notes, *converted)


def rename(state: State, own: State, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """`state` under the names of `own`: without wrappers' prefixes and counters that `own` lacks; and what was done."""
    notes = []
    leaves = {key.rpartition(".")[2] for key in own}
    surplus = {key.rpartition(".")[2] for key in state} & {*COUNTERS, _BATCHES} - leaves
    if surplus:
        dropped = [key for key in state if key.rpartition(".")[2] in surplus]
        state = {key: value for key, value in state.items() if key not in dropped}
        named = ", ".join(sorted(surplus))
        notes.append(f"{source}: {len(dropped)} counters ({named}) were dropped: the model has none")
    best, taken = dict(state), ()
    for candidate, prefixes in _stripped(best):
        if _shared(candidate, own) > _shared(best, own):
            best, taken = candidate, prefixes
    inner = {_WRAPPERS.sub("", key): value for key, value in best.items()}
    if len(inner) == len(best) and _shared(inner, own) > _shared(best, own):
        best = inner
        notes.append(f"{source}: 'module.' and '_orig_mod.' inside the keys were stripped")
    notes[:0] = [f"{source}: the prefix {prefix!r} of every key was stripped" for prefix in taken]
    return best, notes


def check_finite(state: State, source: str) -> None:
    """Raises UsageError naming every tensor of `state` that holds NaN or infinity, or numbers that are no weights."""
    odd = [key for key, value in state.items() if value.is_floating_point() and value.dtype not in _FLOATS]
    if odd:
        raise UsageError(_no_weights(source, [f"{key} ({_dtype(state[key])})" for key in odd]))
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UsageError(
            f"the weights in {source} hold NaN or infinity in {_listing(broken)}: "
            "the training run that wrote them probably diverged; use an earlier checkpoint"
        )


# Which entry ------------------------------------------------------------------------------------------------


def _states(content: object, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """State dicts in a checkpoint by where they stand, the outermost of each branch; "" is the file itself."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    inner = []
    for name, value in content.items():
        if isinstance(name, str):
            inner += _states(value, f"{path}.{name}" if path else name, depth + 1)
    tensors = {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    # Numbers of the training run may stand beside a state dict as tensors: the state dict is what is meant.
    if inner:
        yield from inner
    elif tensors and 2 * len(tensors) >= len(content):
        yield path, tensors


def _fits(state: State, model: nn.Module) -> bool:
    own = model.state_dict()
    renamed, _ = rename(state, own, "")
    return not _try(model, renamed, own)[0]


def _nothing(content: object, path: Path) -> str:
    if not isinstance(content, Mapping):
        return f"{path} holds no state dict but a {type(content).__name__}: save model.state_dict()"
    keys = _listing([str(key) for key in content]) if content else "nothing"
    return (
        f"{path} holds no state dict: tensors by name, or such a dict under a name of its own, are expected; "
        f"it holds {keys}"
    )


# Which names ------------------------------------------------------------------------------------------------


def _stripped(state: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], tuple[str, ...]]]:
    """`state` with one, two, ... prefixes taken off that every key has, in whatever order they stand."""
    taken: tuple[str, ...] = ()
    current = dict(state)
    while True:
        prefix = next((one for one in PREFIXES if all(key.startswith(one) for key in current)), None)
        if prefix is None or not current:
            return
        current = {key.removeprefix(prefix): value for key, value in current.items()}
        taken = (*taken, prefix)
        yield current, taken


def _shared(state: Mapping[str, Tensor], own: State) -> int:
    return sum(key in own for key in state)


def _try(model: nn.Module, state: State, own: State) -> tuple[list[str], list[str]]:
    """What keeps `state` from fitting `model`, and the counters it lacks: found on a copy without memory of its own,
    because the model's hooks may translate names while loading."""
    held = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    memo: dict[int, object] = {id(value): value.detach().to("meta") for value in (*held, *model.buffers())}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    shadow = copy.deepcopy(model, memo)
    shapes = {key: torch.empty(_shape_of(value), device="meta") for key, value in state.items()}
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            missing, unexpected = shadow.load_state_dict(shapes, strict=False)
        except RuntimeError as error:
            wrong = re.findall(
                r"size mismatch for (\S+): .* (?:torch.Size\(\[(.*?)\]\)).* (?:torch.Size\(\[(.*?)\]\))",
                str(error),
            )
            if not wrong:  # a hook of the model refuses
                return [" ".join(str(error).split())[:300]], []
            missing, unexpected = (
                [key for key in own if key not in state],
                [key for key in state if key not in own],
            )
    absent = [
        key for key in own if key.endswith(_BATCHES) and key not in state
    ]  # batch norms fill them in unasked
    given = {value.data_ptr() for key, value in own.items() if key in state and value.numel()}
    tied = [key for key in missing if own[key].numel() and own[key].data_ptr() in given]
    named = {
        "missing": [key for key in missing if key not in absent and key not in tied],
        "unexpected": list(unexpected),
        "wrongly shaped": [f"{key} (file {_shape(file)}, model {_shape(mine)})" for key, file, mine in wrong],
    }
    return [f"{name}: {_listing(keys)}" for name, keys in named.items() if keys], absent


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not (value.is_quantized or value.is_meta or value.is_nested)


def _shape_of(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape) if _is_plain(value) else ()


def _shape(text: str) -> str:
    return str(tuple(int(side) for side in text.split(",") if side.strip()))


# Which numbers ----------------------------------------------------------------------------------------------


def _converted(state: State, own: State, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """`state` in the model's own types where that loses nothing that is meant; and what was converted."""
    result, narrow, odd = {}, set(), []
    for key, value in state.items():
        wanted = own[key].dtype if key in own else None
        floating = wanted.is_floating_point if wanted is not None else value.is_floating_point()
        result[key] = value
        if wanted is None or value.dtype == wanted:
            if floating and value.dtype not in _FLOATS:
                odd.append(f"{key} ({_dtype(value)})")
            continue
        if floating and value.dtype in _FLOATS:
            narrow.add(str(value.dtype))
            result[key] = value.to(wanted)
        elif not floating and key.endswith(_BATCHES) and not value.is_complex():
            result[key] = value.to(wanted)
        elif (
            floating or value.dtype not in _WHOLE or not torch.equal(value.to(wanted).to(value.dtype), value)
        ):
            odd.append(f"{key} ({_dtype(value)})")
        else:
            narrow.add(str(value.dtype))
            result[key] = value.to(wanted)
    if odd:
        raise UsageError(_no_weights(source, odd))
    if not narrow:
        return result, ()
    return result, (f"weights stored as {', '.join(sorted(narrow))} were converted to the model's own type",)


def _no_weights(source: str, odd: list[str]) -> str:
    return (
        f"the weights in {source} are stored as other numbers than weights are: {_listing(odd)}; such files are "
        "quantised or packed and need their own code to be read. Give the checkpoint in float32, float16 or bfloat16 "
        "it was made from, or convert it back first"
    )


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _kind(value: Tensor) -> str:
    kinds = {"quantised": value.is_quantized, "nested": value.is_nested, "without values": value.is_meta}
    return next((kind for kind, is_it in kinds.items() if is_it), str(value.layout).removeprefix("torch."))


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
