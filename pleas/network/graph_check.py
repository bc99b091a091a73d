"""What a module config may say. It may come from a stranger: nothing in it can name code to run or a file to open.

`fx.GraphModule` writes the graph out as Python source and runs it, so every name that ends up in that source is
checked here, before a graph is made; and an op of `aten` is allowed only where no argument can be a file's name.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pleas.errors import InputError

_OPS = ("placeholder", "get_attr", "call_module", "call_function", "output")
_DEEPEST = 16  # lists in lists among a node's arguments
# Arguments of aten ops that are a word out of a short list; any other text could be a file's name or a message.
_WORDS = {
    "approximate", "assert_msg", "driver", "equation", "indexing", "interpolation", "mode", "norm", "ord", "p",
    "pad_mode", "padding", "reduce", "rounding_mode", "side", "UPLO",
}  # fmt: skip
_LAYER = {"kernel", "reads", "widths", "rows", "units", "order", "bias", "geometry"}
_GEOMETRY = {"stride", "padding", "dilation", "groups"}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise InputError, with the place, unless `config` is what `program_config` returns: plain data all through."""
    for key, kind in (
        ("graph", list),
        ("layers", dict),
        ("tensors", dict),
        ("head_sizes", list),
        ("notes", list),
    ):
        _demand(isinstance(config.get(key), kind), key, f"a {kind.__name__} is expected")
    for name, spec in config["layers"].items():
        _check_path(name, "layers")
        _check_layer(spec, f"layers.{name}")
    for name, spec in config["tensors"].items():
        _check_path(name, "tensors")
        where = f"tensors.{name}"
        _demand(
            isinstance(spec, dict) and spec.keys() == {"shape", "dtype", "parameter"},
            where,
            "shape, dtype, parameter are expected",
        )
        _check_counts(spec["shape"], f"{where}.shape")
        _demand(isinstance(_of_torch(spec["dtype"]), torch.dtype), f"{where}.dtype", "no dtype of torch")
        _demand(isinstance(spec["parameter"], bool), f"{where}.parameter", "true or false is expected")
    _check_counts(config["head_sizes"], "head_sizes")
    _demand(all(isinstance(note, str) for note in config["notes"]), "notes", "texts are expected")
    _check_graph(config)


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the state dict of the module that a checked `config` describes."""
    shapes = {name: tuple(spec["shape"]) for name, spec in config["tensors"].items()}
    for name, spec in config["layers"].items():
        groups = 1 if spec["geometry"] is None else spec["geometry"]["groups"]
        rows, single = spec["rows"], len(spec["rows"]) == 1
        for i, (count, width) in enumerate(zip(rows, spec["widths"], strict=True)):
            shapes[f"{name}.weight" if single else f"{name}.weight_{i}"] = (
                count,
                width // groups,
                *spec["kernel"],
            )
        if spec["bias"]:
            shapes[f"{name}.bias"] = (sum(rows),)
    return shapes


def check_op(op: Any, where: str) -> None:
    """Raise InputError where an aten op takes a text that is not a word out of a short list: a file's name."""
    _demand(isinstance(op, torch._ops.OpOverload), where, "no such op")
    texts = [argument.name for argument in op._schema.arguments if "str" in str(argument.type).split("[")[-1]]
    named = [name for name in texts if name not in _WORDS]
    _demand(not named, where, f"{op} takes a text ({', '.join(named)}), which could name a file")


def _check_graph(config: Mapping[str, Any]) -> None:
    known: set[str] = set()
    for index, node in enumerate(config["graph"]):
        where = f"graph[{index}]"
        _demand(
            isinstance(node, dict) and node.keys() == {"name", "op", "target", "args", "kwargs"},
            where,
            "name, op, target, args, kwargs are expected",
        )
        op, target = node["op"], node["target"]
        _check_word(node["name"], f"{where}.name")
        _demand(op in _OPS, f"{where}.op", f"{op!r} is none of {', '.join(_OPS)}")
        _demand(isinstance(target, str), f"{where}.target", "a text is expected")
        if op in ("placeholder", "output"):
            _check_word(target, f"{where}.target")
        elif op != "call_function":
            held = config["layers"] if op == "call_module" else config["tensors"]
            _demand(target in held, f"{where}.target", f"{target!r} is not described")
        _demand(isinstance(node["args"], list), f"{where}.args", "a list is expected")
        _demand(isinstance(node["kwargs"], dict), f"{where}.kwargs", "an object is expected")
        for key in node["kwargs"]:
            _check_word(key, f"{where}.kwargs")
        _check_value([node["args"], list(node["kwargs"].values())], known, f"{where}.args")
        _demand(node["name"] not in known, f"{where}.name", f"{node['name']!r} appears twice")
        known.add(node["name"])
    last = config["graph"][-1]["op"] if config["graph"] else None
    outputs = sum(node["op"] == "output" for node in config["graph"])
    _demand(last == "output" and outputs == 1, "graph", "one output is expected, at the end")


def _check_value(value: Any, known: set[str], where: str, depth: int = 0) -> None:
    _demand(depth <= _DEEPEST, where, f"more than {_DEEPEST} lists inside each other")
    match value:
        case list():
            for item in value:
                _check_value(item, known, where, depth + 1)
        case {"node": str(name)}:
            _demand(name in known, where, f"{name!r} is not computed before")
        case {"torch": str(name)}:
            allowed = torch.dtype | torch.layout | torch.memory_format
            _demand(
                isinstance(_of_torch(name), allowed),
                where,
                f"torch.{name} is no dtype, layout or memory format",
            )
        case {"device": str(name)}:
            _demand(name.partition(":")[0] in ("cpu", "cuda", "mps", "xpu"), where, f"{name!r} is no device")
        case {"float": str(text)}:
            _demand(text in ("inf", "-inf"), where, f"{text!r} is no infinity")
        case None | bool() | int() | str():
            pass
        case float():
            _demand(math.isfinite(value), where, "a number that is not finite")
        case _:
            _demand(False, where, f"a {type(value).__name__} that means nothing here")


def _check_layer(spec: Any, where: str) -> None:
    _demand(
        isinstance(spec, dict) and spec.keys() == _LAYER, where, f"{', '.join(sorted(_LAYER))} are expected"
    )
    for key in ("kernel", "widths", "rows"):
        _check_counts(spec[key], f"{where}.{key}")
    _demand(isinstance(spec["bias"], bool), f"{where}.bias", "true or false is expected")
    _check_counts([spec["units"]], f"{where}.units")
    units, reads = spec["units"], spec["reads"]
    _demand(
        isinstance(reads, list) and len(reads) == len(spec["rows"]) > 0,
        f"{where}.reads",
        "one per block is expected",
    )
    _demand(len(spec["widths"]) == len(reads), f"{where}.widths", "one per block is expected")
    for read, width in zip(reads, spec["widths"], strict=True):
        match read:
            case {"slice": [int(first), int(last)]}:
                fits = 0 <= first <= last <= units and last - first == width
            case {"index": list(places)}:
                fits = len(places) == width and all(type(i) is int and 0 <= i < units for i in places)
            case _:
                fits = False
        _demand(fits, f"{where}.reads", f"not {width} of {units} units")
    order, total = spec["order"], sum(spec["rows"])
    if order is not None:
        _check_counts(order, f"{where}.order")
        _demand(sorted(order) == list(range(total)), f"{where}.order", f"not an order of {total} rows")
    geometry = spec["geometry"]
    if geometry is None:
        return
    _demand(
        isinstance(geometry, dict) and geometry.keys() == _GEOMETRY,
        f"{where}.geometry",
        f"{', '.join(sorted(_GEOMETRY))} are expected",
    )
    for key in ("stride", "padding", "dilation"):
        _check_counts(geometry[key], f"{where}.geometry.{key}")
    groups = geometry["groups"]
    _demand(type(groups) is int and groups > 0, f"{where}.geometry.groups", "a count is expected")


def _check_counts(value: Any, where: str) -> None:
    fits = isinstance(value, Sequence) and all(type(item) is int and 0 <= item < 2**48 for item in value)
    _demand(fits, where, "a list of counts is expected")


def _check_word(value: Any, where: str) -> None:
    fits = isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value)
    _demand(fits, where, f"{value!r:.80} is not a plain name")


def _check_path(name: str, where: str) -> None:
    """A dotted name: each part may be written between double quotes and stays one text."""
    parts = name.split(".")
    fits = all(part and part.isprintable() and not set(part) & set("\"\\'") for part in parts)
    _demand(
        fits and not any(part.startswith("__") for part in parts), where, f"{name!r:.80} is not a plain name"
    )


def _of_torch(name: Any) -> Any:
    return getattr(torch, name, None) if isinstance(name, str) else None


def _demand(condition: bool, where: str, why: str) -> None:
    if not condition:
        raise InputError(f"module config, {where}: {why}")
