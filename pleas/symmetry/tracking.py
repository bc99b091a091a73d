"""One pass over a program: every node gets its labels, the ledger gets what the ops found out."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from pleas.errors import PleasError, UnsupportedModel
from pleas.symmetry import averages, contractions, moves
from pleas.symmetry.algebra import Algebra, anonymous
from pleas.symmetry.labels import Ledger, Shape, Val, along, positions
from pleas.symmetry.program import Program, state_of
from pleas.symmetry.rewrites import module_path
from pleas.symmetry.rules import Op, Result, op_name, rule_for, unlisted

aten = torch.ops.aten
RULE_MODULES = (averages, contractions, moves)  # importing them fills the table of rules

FOLDED = 1 << 24  # constants up to this many elements are computed, to serve as indices


@dataclass(frozen=True)
class Unruled:
    """An op without a rule, and the ids it pinned."""

    op: str
    node: str
    module: str
    ids: np.ndarray


@dataclass(frozen=True)
class Tracked:
    """The outcome of the pass. `groups`: FQN of a grouped convolution's weight -> number of groups."""

    ledger: Ledger
    values: Mapping[str, Val]
    output: np.ndarray  # ids that reach the output
    unruled: tuple[Unruled, ...]
    groups: Mapping[str, int]


class Tracker:
    """Walks the graph once. Use `track`."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.owner = type(model).__name__
        self.program, self.state = program, state_of(program, model)
        saved = model.state_dict().keys()
        self.constants = {*program.constants, *(name for name in program.buffers if name not in saved)}
        self.ledger = Ledger()
        self.values: dict[fx.Node, Any] = {}
        self.dynamic: set[fx.Node] = set()  # nodes that depend on the image
        self.unruled: list[Unruled] = []
        self.groups = _grouped_weights(program.graph)
        self.statistics = _running_statistics(program.graph)
        self.output = np.zeros(0, np.int64)

    def run(self) -> Tracked:
        for node in self.program.graph.nodes:
            self.values[node] = self._value(node)
        named = {node.name: value for node, value in self.values.items() if isinstance(value, Val)}
        return Tracked(self.ledger, named, self.output, tuple(self.unruled), self.groups)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return anonymous(shape_of(node.meta["val"]))
        if node.op == "get_attr":
            return self._source(node)
        if node.op == "output":
            return self._finish(self.values[node.args[0]])  # type: ignore[index]
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            return hint(value)
        if node.target is operator.getitem:
            self.dynamic |= {node} if self._depends(node.args[0]) else set()
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        return self._call(node)

    def _source(self, node: fx.Node) -> Val:
        """Parameters and running statistics get ids on every axis; everything else is fixed.

        Constants and buffers outside the state dict are the same for all networks of the architecture, so that their
        numbers may be looked at: where they do not vary, there is nothing to fix. Other buffers are fixed altogether.
        """
        name = str(node.target)
        tensor = self.state[name]
        shape = tuple(tensor.shape)
        if name in self.constants:
            return _constant(tensor.cpu())
        if name in self.program.buffers and name not in self.statistics:
            return replace(anonymous(shape), const=tensor.cpu())
        algebra = Algebra(self.ledger, f"source {name}", "")
        dims = [d for d in range(len(shape)) if shape[d] > 1 or (d == 1 and name in self.groups)]
        axes = [Val(shape, [self._axis(name, d, shape)]) for d in dims]
        return algebra.meet(axes, shape)

    def _axis(self, name: str, dim: int, shape: Shape) -> Tensor:
        groups = self.groups.get(name, 1)
        if dim != 1 or groups == 1:
            return along(self.ledger.born_on(name, dim, shape[dim]), dim, len(shape))
        # Inner axis of a grouped convolution: one id per (group, index), that is per channel of the whole layer.
        ids = self.ledger.born_on(name, 1, groups * shape[1], groups).reshape(groups, 1, shape[1])
        label = ids.expand(groups, shape[0] // groups, shape[1]).reshape(shape[0], shape[1])
        return label.reshape(*label.shape, *(1,) * (len(shape) - 2))

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        shapes = [shape_of(v) for v in _tensors(node.meta["val"])]
        if not shapes:
            return None
        args = _named_arguments(node, self._resolve)
        name = op_name(target) if isinstance(target, torch._ops.OpOverload) else str(target)
        where = module_path(node)
        reason = f"{name} in {where or 'the model'} fixes its position"
        dynamic = frozenset(k for k, v in _named_arguments(node, lambda a: a).items() if self._depends(v))
        op = Op(node, name, args, shapes, Algebra(self.ledger, node.name, reason), dynamic)
        if any(self._depends(source) for source in node.all_input_nodes):
            self.dynamic.add(node)
        constant = self._folded(node, op)
        if not op.values and constant is not None:
            return _constant(constant)
        found = rule_for(target)
        if found is None and constant is not None and not any(value.free for value in op.values):
            return replace(anonymous(op.shape), const=constant)
        try:
            result: Result = (found or unlisted)(op)
        except PleasError:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"the symmetry rule of {name} fails at {node.name} in "
                f"{f'module {where!r} of ' if where else ''}{self.owner} ({type(error).__name__}: {error}); this is a "
                "bug in pleas: please report the model"
            ) from error
        if found is None:
            ids = [f.reshape(-1).numpy() for value in op.values for f in value.free]
            pinned = np.unique(np.concatenate([*ids, np.zeros(0, np.int64)]))
            self.unruled.append(Unruled(name, node.name, where, pinned))
        if constant is not None and isinstance(result, Val):
            result.const = constant
        return result

    def _depends(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and (argument.op == "placeholder" or argument in self.dynamic)

    def _resolve(self, argument: Any) -> Any:
        return map_arg(argument, lambda node: self.values[node])

    def _folded(self, node: fx.Node, op: Op) -> Tensor | None:
        """The numbers of a node that depends on constants only."""
        value = node.meta["val"]
        small = isinstance(value, Tensor) and np.prod(op.shape, dtype=np.int64) <= FOLDED
        if (
            not small
            or any(v.const is None for v in op.values)
            or torch.Tag.nondeterministic_seeded in _tags(node)
        ):
            return None

        def number(source: fx.Node) -> Any:
            value = self.values[source]
            return value.const if isinstance(value, Val) else value

        args, kwargs = map_arg((node.args, node.kwargs), number)  # type: ignore[misc]
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _finish(self, value: Val) -> None:
        labels = [f.reshape(-1) for f in value.free]
        ids = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)
        Algebra(self.ledger, "output", "").see(value)
        self.output = ids[ids >= 0].unique().numpy()


def track(program: Program, model: nn.Module) -> Tracked:
    """Labels for every node of the program. `model` supplies shapes, and the numbers of constants."""
    return Tracker(program, model).run()


def hint(value: Any) -> Any:
    """A plain number for a symbolic one: its value in the exported example."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        node: Any = value.node
        return node.require_hint() if hasattr(node, "require_hint") else node.hint
    return value


def shape_of(value: Any) -> Shape:
    return tuple(int(hint(size)) for size in value.shape)


def _tensors(value: Any) -> list[Any]:
    items = value if isinstance(value, list | tuple) else [value]
    return [v for v in items if isinstance(v, Tensor)]


def _tags(node: fx.Node) -> list[Any]:
    return list(getattr(node.target, "tags", []))


def _named_arguments(node: fx.Node, resolve: Any) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in, symbolic numbers replaced by their hints."""
    schema = getattr(node.target, "_schema", None)
    args = [_plain(resolve(a)) for a in node.args]
    kwargs = {k: _plain(resolve(a)) for k, a in node.kwargs.items()}
    if schema is None:
        return {str(i): a for i, a in enumerate(args)} | kwargs
    named: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(args):
            named[argument.name] = args[i]
        else:
            named[argument.name] = kwargs.get(argument.name, argument.default_value)
    return named


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return hint(value)


def _constant(tensor: Tensor) -> Val:
    """A constant of the graph itself: fixed along the dimensions its numbers vary on."""
    dims = [
        d
        for d in range(tensor.dim())
        if tensor.shape[d] > 1 and bool((tensor != tensor.narrow(d, 0, 1)).any())
    ]
    return Val(tuple(tensor.shape), [], positions(tensor.shape, dims), tensor)


def _grouped_weights(graph: fx.Graph) -> dict[str, int]:
    """The parameters that serve as weights of grouped convolutions, also through weight standardisation."""
    groups: dict[str, int] = {}
    for node in graph.nodes:
        if node.target is not aten.convolution.default:
            continue
        if isinstance(node.args[8], fx.Node):
            raise _conditional(node)
        if node.args[8] > 1:
            shape = shape_of(node.args[1].meta["val"])
            found = _parameters_behind(node.args[1], shape)
            groups.update(dict.fromkeys(found, int(node.args[8])))
    return groups


def _conditional(node: fx.Node) -> UnsupportedModel:
    """Why a convolution whose number of groups is the batch size is refused."""
    where = module_path(node)
    behind = _parameters_within(node, where)
    helps = (
        "a plain convolution in its place (one kernel for all images); a rule cannot help, for the units of such a "
        "layer depend on the image"
    )
    return UnsupportedModel(
        f"the convolution {node.name} in module {where!r} has as many groups as the batch has images: its kernels are "
        "computed for every image (conditional convolution), and such kernels have no fixed units to match. "
        f"The parameters behind it: {', '.join(behind) or 'none'}. What would help: {helps}.",
        [
            {
                "op": "convolution",
                "node": node.name,
                "module": where,
                "parameters": behind,
                "help": helps,
            }
        ],
    )


def _parameters_within(node: fx.Node, where: str) -> list[str]:
    """The tensors a node is computed from inside its own module, in graph order."""
    seen, queue, found = {node}, [node], set()
    while queue:
        for source in queue.pop().all_input_nodes:
            if source.op == "get_attr":
                found.add(str(source.target))
            elif source not in seen and module_path(source) == where:
                seen.add(source)
                queue.append(source)
    return [name for n in node.graph.nodes if n.op == "get_attr" and (name := str(n.target)) in found]


def _parameters_behind(node: fx.Node, shape: Shape) -> set[str]:
    """The get_attr nodes of this shape that a weight is computed from."""
    seen, queue, found = {node}, [node], set()
    while queue:
        node = queue.pop()
        if node.op == "get_attr" and shape_of(node.meta["val"]) == shape:
            found.add(str(node.target))
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        queue += fresh
    return found


def _running_statistics(graph: fx.Graph) -> set[str]:
    """The buffers that batch norms use as mean and variance: the only ones with channels to permute."""
    norms = [n for n in graph.nodes if n.target is aten._native_batch_norm_legit_no_training.default]
    return {str(source.target) for n in norms for source in n.args[3:5] if source.op == "get_attr"}
