"""The merged module: a network whose widened layers are stored, and computed, as their blocks.

Structural zeros cost neither memory nor multiply-adds, so `FlopCounterMode` counts what the plan promised and
a plan that fuses nothing is the two parents side by side. The module is built from a graph of core ATen ops
and describes itself in plain data (`config`), from which `module_from_config` rebuilds it without the
parents' source code.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from pleas.errors import InputError
from pleas.network.counting import counting
from pleas.network.graph_check import check_config, check_op


class BlockLayer(nn.Module):
    """A layer `y = W x + b` whose output rows fall into blocks, each reading its own part of the input.

    reads:    per block, the input units it reads: {"slice": [first, last]} or {"index": [...]}
    rows:     per block, how many output units it gives
    order:    where the concatenated blocks' rows go, or None when they are in order already
    geometry: stride, padding, dilation, groups of a convolution; None for a linear layer
    """

    def __init__(
        self,
        kernel: Sequence[int],
        reads: Sequence[Mapping[str, Sequence[int]]],
        widths: Sequence[int],
        rows: Sequence[int],
        units: int,
        order: Sequence[int] | None,
        bias: bool,
        geometry: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.config = {
            "kernel": list(kernel),
            "reads": [{kind: list(units) for kind, units in read.items()} for read in reads],
            "widths": list(widths),
            "rows": list(rows),
            "units": units,
            "order": None if order is None else list(order),
            "bias": bias,
            "geometry": None if geometry is None else dict(geometry),
        }
        self.units = units
        self.geometry = self.config["geometry"]
        self.rows = list(rows)
        self.slices: list[tuple[int, int] | None] = []
        for i, read in enumerate(reads):
            self.slices.append((read["slice"][0], read["slice"][1]) if "slice" in read else None)
            if "index" in read:
                self.register_buffer(f"index_{i}", torch.tensor(read["index"]), persistent=False)
        groups = 1 if self.geometry is None else self.geometry["groups"]
        names = ["weight"] if len(rows) == 1 else [f"weight_{i}" for i in range(len(rows))]
        for name, count, width in zip(names, rows, widths, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(count, width // groups, *kernel)))
        self.weight_names = names
        self.register_parameter("bias", nn.Parameter(torch.empty(sum(rows))) if bias else None)
        if order is not None:
            self.register_buffer("order", torch.tensor(order), persistent=False)
        else:
            self.order = None

    @property
    def subsamples(self) -> bool:
        """Whether this is a strided convolution of single pixels."""
        g = self.geometry
        if g is None or all(step == 1 for step in g["stride"]):
            return False
        return all(side == 1 for side in self.config["kernel"]) and not any(g["padding"])

    def forward(self, x: Tensor) -> Tensor:
        dim = 1 if self.geometry is not None else x.dim() - 1
        out = []
        bias = self.bias if isinstance(self.bias, Tensor) else None
        biases = [None] * len(self.rows) if bias is None else torch.split(bias, self.rows)
        for i, (name, part, own) in enumerate(zip(self.weight_names, self.slices, biases, strict=True)):
            weight = getattr(self, name)
            if part == (0, self.units):
                seen = x
            elif part is not None:
                seen = x.narrow(dim, part[0], part[1] - part[0])
            else:
                seen = x.index_select(dim, getattr(self, f"index_{i}"))
            out.append(
                F.linear(seen, weight, own) if self.geometry is None else self._convolve(seen, weight, own)
            )
        joined = out[0] if len(out) == 1 else torch.cat(out, dim)
        return joined if self.order is None else joined.index_select(dim, self.order)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        g = self.geometry
        assert g is not None
        stride, zeros = g["stride"], [0] * len(g["stride"])
        if self.subsamples:
            # The same numbers by another kernel: oneDNN's gradient of a strided 1x1 weight with few inputs writes past
            # its workspace (oneDNN issue 6035), and blocks often have few.
            x = x[(..., *(slice(None, None, step) for step in stride))]
            stride = [1] * len(stride)
        return torch.convolution(
            x, weight, bias, stride, g["padding"], g["dilation"], False, zeros, g["groups"]
        )


class MergedNetwork(fx.GraphModule):
    """The merged network at any budget. Parameter names are the parents' own; a layer in blocks has
    `weight_0`, `weight_1`...

    Input: images as the parents see them, (N, C, H, W). Output: (N, K) logits; with one head per parent (N,
        K_a + K_b), A's outputs first, and `head_sizes = (K_a, K_b)`.
    """

    config: dict[str, Any]

    @property
    def head_sizes(self) -> tuple[int, ...]:
        return tuple(self.config["head_sizes"])

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedNetwork:
        parameter = next(iter(self.parameters()))
        clone = module_from_config(copy.deepcopy(self.config))
        clone.load_state_dict({name: value.detach().clone() for name, value in self.state_dict().items()})
        clone.to(device=parameter.device, dtype=parameter.dtype).train(self.training)
        for ours, theirs in zip(self.parameters(), clone.parameters(), strict=True):
            theirs.requires_grad_(ours.requires_grad)
        return clone


def build_network(
    graph: fx.Graph,
    layers: Mapping[str, BlockLayer],
    tensors: Mapping[str, tuple[Tensor, bool]],
    head_sizes: Sequence[int],
    notes: Sequence[str] = (),
) -> MergedNetwork:
    """A module around a graph whose call_module nodes name `layers` and whose get_attr nodes name `tensors`
    (value, whether it is a parameter)."""
    root = nn.Module()
    for name, layer in layers.items():
        _attach(root, name, layer)
    for name, (value, trainable) in tensors.items():
        _attach(
            root,
            name,
            nn.Parameter(value, requires_grad=trainable and value.is_floating_point())
            if trainable
            else value,
        )
    network = MergedNetwork(root, graph)
    network.config = {
        "format": 1,
        "graph": graph_to_data(graph),
        "layers": {name: layer.config for name, layer in layers.items()},
        "tensors": {
            name: {
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                "parameter": trainable,
            }
            for name, (value, trainable) in tensors.items()
        },
        "head_sizes": list(head_sizes),
        "notes": list(notes),
    }
    return network.eval()


def _attach(root: nn.Module, name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    elif isinstance(value, nn.Module):
        root.add_module(last, value)
    else:
        root.register_buffer(last, value)


def program_config(module: nn.Module) -> dict[str, Any] | None:
    """Plain data that rebuilds the module, or None when the module is of the parents' own class."""
    return copy.deepcopy(module.config) if isinstance(module, MergedNetwork) else None


def module_from_config(config: Mapping[str, Any]) -> MergedNetwork:
    """Inverse of `program_config`, with uninitialised weights: follow with `load_state_dict`.

    Only ops of the `aten` namespace and `operator` are accepted, names are plain names, and no argument can be a
    file's name, so a config can neither run code nor open a file. Raises InputError for anything else.
    """
    if config.get("format") != 1:
        raise InputError(
            f"module config has format {config.get('format')!r}, this version reads format 1: "
            "it was saved by another version of datafree"
        )
    check_config(config)
    graph = graph_from_data(config["graph"])
    layers = {name: BlockLayer(**spec) for name, spec in config["layers"].items()}
    tensors = {
        name: (torch.empty(spec["shape"], dtype=getattr(torch, spec["dtype"])), spec["parameter"])
        for name, spec in config["tensors"].items()
    }
    return build_network(graph, layers, tensors, config["head_sizes"], config["notes"])


# --- graphs as plain data ---


def graph_to_data(graph: fx.Graph) -> list[dict[str, Any]]:
    """A graph of aten ops as a list of JSON-able nodes."""
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _target_to_data(node),
            "args": _to_data(node.args),
            "kwargs": {key: _to_data(value) for key, value in node.kwargs.items()},
        }
        for node in graph.nodes
    ]


def graph_from_data(data: Sequence[Mapping[str, Any]]) -> fx.Graph:
    """Inverse of `graph_to_data`. Raises InputError for a target outside `aten` and `operator`."""
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    for item in data:
        target = _target_from_data(item["op"], item["target"])
        args = _from_data(item["args"], env)
        kwargs = {key: _from_data(value, env) for key, value in item["kwargs"].items()}
        env[item["name"]] = graph.create_node(item["op"], target, tuple(args), kwargs, name=item["name"])
    graph.lint()
    return graph


_OPERATORS = {
    f"operator.{name}": getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "mod")
}


def _target_to_data(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    for name, function in _OPERATORS.items():
        if node.target is function:
            return name
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        return str(node.target)
    raise InputError(
        f"node '{node.name}' calls {node.target}, which is neither an aten op nor a plain operator: "
        "the merged module cannot be saved"
    )


def _target_from_data(op: str, target: str) -> Any:
    if op != "call_function":
        return target
    if target in _OPERATORS:
        return _OPERATORS[target]
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    if namespace != "aten" or not hasattr(torch.ops.aten, name):
        raise InputError(f"module config calls '{target}': only aten ops and plain operators are allowed")
    found: Any = getattr(getattr(torch.ops.aten, name), overload or "default", None)
    check_op(found, f"call of '{target}'")
    return found


def _to_data(value: Any) -> Any:
    match value:
        case fx.Node():
            return {"node": value.name}
        case tuple() | list():
            return [_to_data(item) for item in value]
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {"torch": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
        case None | bool() | int() | str():
            return value
        case float():
            return value if abs(value) != float("inf") else {"float": str(value)}
    raise InputError(
        f"cannot save an argument of type {type(value).__name__} ({value!r}) of the merged graph"
    )


def _from_data(value: Any, env: Mapping[str, fx.Node]) -> Any:
    match value:
        case {"node": name}:
            return env[name]
        case {"torch": name}:
            return getattr(torch, name)
        case {"device": name}:
            return torch.device(name)
        case {"float": text}:
            return float(text)
        case list():
            return [_from_data(item, env) for item in value]
    return value


def flops(module: nn.Module, example: Tensor) -> int:
    """Floating-point operations of one forward pass of one image, 2 per multiply-add: the same whatever kernels torch
    picks (see `counting`).

    Runs on fake tensors in place of the module's own: no arithmetic, no change to the module, wherever it is. (The meta
    device would not do: a forward may ask for the device of its input, and make constants there.)
    """
    shadow = copy.deepcopy(module).eval()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, counting() as counter, torch.no_grad():
        for part in shadow.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(_unfilled(value), requires_grad=False)
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = _unfilled(value)
        shadow(torch.empty(1, *example.shape[1:], dtype=example.dtype))
    return int(counter.get_total_flops())


def _unfilled(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
