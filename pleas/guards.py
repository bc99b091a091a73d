"""What parents have to be, beyond tensors of equal shapes, before anything is computed from them.

Only one parent's graph is ever used: every parent is run as it is, and through that graph with its own weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pleas.errors import ArchitectureMismatch, NonFinite, PleasError, UnsupportedModel
from pleas.layers.layer import find_layers, find_norms
from pleas.symmetry import Program, Symmetry, UnitClass, execute, export_program, logits_of, state_of
from pleas.symmetry.copies import device_of, evaluation_copy, unwrap
from pleas.symmetry.rewrites import module_path
from pleas.symmetry.rules import op_name
from pleas.symmetry.undisturbed import own_copy, same_random_state

SAME = 1e-9  # relative, in float64: rounding
SAME_SINGLE = 1e-4  # the same where a forward insists on single precision
NOTED = 1e-4  # a larger difference of two forwards is refused, a smaller one only said (another epsilon)
LARGE = 30.0  # images far outside the usual range reach the bends that usual ones do not (ReLU6 and ReLU)


def check_forwards(
    program: Program, modules: Sequence[nn.Module], example: Tensor, names: Sequence[str] = ()
) -> tuple[str, ...]:
    """Every check of this file on every parent; returns what is to be said.

    program: exported from modules[0]     example: (N, C, H, W), of which shape, type and device count
    names:   of the parents in messages (by default a, b, c, ...)
    Raises ArchitectureMismatch where a parent computes another function than the program, UnsupportedModel where a
    row of its output depends on the other images, NonFinite where its logits are not finite.
    """
    names, modules = names or parent_names(len(modules)), [unwrap(module) for module in modules]
    notes = list(check_same_function(program, modules, example, names))
    for module, name in zip(modules, names, strict=True):
        check_rows_alone(program, module, example, name)
        if changes_input(module, _images(program, example, module).to(example.dtype)):
            notes.append(
                f"The forward of parent {name} changes its input in place: give every network a copy of the images."
            )
    return tuple(notes)


def parent_names(count: int) -> tuple[str, ...]:
    """a, b, c, ... and p26, p27, ... beyond."""
    return tuple(chr(ord("a") + i) if i < 26 else f"p{i}" for i in range(count))


def check_same_function(
    program: Program, modules: Sequence[nn.Module], example: Tensor, names: Sequence[str] = ()
) -> tuple[str, ...]:
    """Raise ArchitectureMismatch unless the program, with each parent's tensors, computes what the parent computes.

    Seeded random images are used, of the usual size of activations and far beyond it, in float64. A difference above
    1e-4 of the logits' scale is refused, naming the first operation that differs; a smaller one is returned as a note.
    """
    names = names or parent_names(len(modules))
    notes: list[str] = []
    own = 0.0  # what the first parent's own casts to single precision cost
    for module, name in zip(modules, names, strict=True):
        with torch.no_grad(), same_random_state(unwrap(module)):
            error, tolerance = _difference(program, unwrap(module), example, name)
        if name == names[0] and error < NOTED:
            own = 10.0 * error
        if error < max(tolerance, own):
            continue
        if name == names[0]:
            raise UnsupportedModel(
                f"the graph of parent {name} does not compute what the parent computes (relative difference "
                f"{error:.1e}): its forward depends on more than its input and weights"
            )
        what = _first_difference(program, module, example, name, names[0])
        if error < NOTED:
            notes.append(
                f"{what[0].upper()}{what[1:]}: its logits differ by {error:.1e} of their scale, and parent "
                f"{names[0]}'s way is merged."
            )
            continue
        raise ArchitectureMismatch(
            f"the parents' tensors agree, but not what is computed from them: {what}. Run through the graph of "
            f"parent {names[0]}, the weights of parent {name} give logits that differ by {error:.2g} of their scale. "
            "Build both parents by the same definition, with the same arguments."
        )
    return tuple(notes)


def check_rows_alone(program: Program, module: nn.Module, example: Tensor, name: str = "a") -> None:
    """Raise UnsupportedModel where the logits of an image depend on the other images of its batch."""
    images = _images(program, example, unwrap(module))
    others = images.clone()
    others[1:] = 3.0 * others[1:].flip(-1) + 1.0
    with torch.no_grad(), same_random_state(unwrap(module)):
        run = _runner(unwrap(module), images)
        alone, beside = (run(batch)[:1] for batch in (images, others))
    if not _relative(beside, alone) < (SAME if run.dtype is torch.float64 else SAME_SINGLE):
        batch_norms = [
            path
            for path, part in unwrap(module).named_modules()
            if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is None
        ]
        cause = (
            f"batch norm {batch_norms[0]!r} keeps no running statistics (track_running_stats=False) and normalises by "
            "its batch"
            if batch_norms
            else "some op runs over the images of the batch"
        )
        raise UnsupportedModel(
            f"parent {name}: the logits of an image depend on the other images of its batch: {cause}. A network to "
            "merge must treat every image alone: train it with running statistics."
        )


def changes_input(module: nn.Module, images: Tensor) -> bool:
    """Whether the forward writes into the batch it is given."""
    given, model = images.clone(), unwrap(module)
    with torch.no_grad(), same_random_state(model):
        evaluation_copy(model, share=False)(given)
    return not torch.equal(given, images)


def unmatched_classes(symmetry: Symmetry) -> tuple[UnitClass, ...]:
    """Classes, those of the output apart, whose units no layer reads or writes: least squares say nothing of them.

    Such are the channels between transposed convolutions, between weights that are computed (weight norm, weight
    standardisation), and what is only reshaped in between. Matching has no similarity for them.
    """
    weights = {layer.weight for layer in find_layers(symmetry.program)}
    norms = {norm.mean for norm in find_norms(symmetry.program)}
    found = []
    for index, cls in enumerate(symmetry.classes):
        if index in symmetry.output:
            continue
        for part in _leaves(cls):
            known = any(
                (axis.tensor in weights and axis.dim < 2) or axis.tensor in norms for axis in part.axes
            )
            if not known:
                found.append(part)
    return tuple(found)


def _leaves(cls: UnitClass) -> list[UnitClass]:
    """The class, or the classes inside its first unit where units have inner ones (they are all alike)."""
    return [leaf for child in cls.children[0] for leaf in _leaves(child)] if cls.children else [cls]


# Ops of which the mean over parents is the op of the mean.
MEAN_KEEPING = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select",
    "clone", "alias", "_to_copy", "mean", "sum", "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "add", "sub",
    "getitem",
}  # fmt: skip


def ensemble_obstacles(symmetry: Symmetry) -> tuple[str, ...]:
    """Why a merge that keeps every unit apart is not the mean of the parents' logits; empty where it is.

    A merged network averages where its last layers write, so that what comes after has to keep means; and values that
    stand on no class of units (the weights of experts, say) have one copy at any budget. Classes that cannot be kept
    apart are not repeated here: see `UnitClass.reason`.
    """
    found = []
    nodes = {node.name: node for node in symmetry.program.graph.nodes}
    layers = {name: layer for layer in find_layers(symmetry.program) for name in layer.nodes}
    queue, seen = [node for node in nodes.values() if node.op == "output"], set()
    last: set[str] = set()
    while queue:
        for source in queue.pop().all_input_nodes:
            if (
                source in seen
                or source.op != "call_function"
                or not isinstance(source.meta.get("val"), Tensor)
            ):
                continue
            seen.add(source)
            if source.name in layers:
                last.add(layers[source.name].name)
            elif _name(source) in MEAN_KEEPING or _by_a_number(source):
                queue.append(source)
            else:
                where = f" in module {module_path(source)}" if module_path(source) else ""
                found.append(
                    f"{_name(source)}{where} comes after the layer whose outputs are averaged: the ensemble "
                    "averages behind it"
                )
    for layer in dict.fromkeys(layers.values()):
        if (
            layer.name not in last
            and bool((symmetry.axis(layer.weight, 0).cls < 0).all())
            and layer.out_units > 1
        ):
            found.append(
                f"the {layer.out_units} outputs of {layer.name} are of no class of units, and there is one copy of "
                f"them at any budget ({symmetry.fixed.get((layer.weight, 0), 'they are fixed')})"
            )
    return tuple(found)


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return op_name(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _by_a_number(node: fx.Node) -> bool:
    """A product or quotient with a plain number."""
    plain_number = len(node.args) > 1 and isinstance(node.args[1], int | float)
    return plain_number and _name(node) in ("mul", "div")


# --- running parents ---


def _images(program: Program, example: Tensor, module: nn.Module) -> Tensor:
    """(N, C, H, W) float64 noise where the module is; N is two, or what the program insists on."""
    shape = (program.batch or 2, *example.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device_of(module), torch.float64)


@dataclass(frozen=True)
class _Run:
    """A copy of a parent in float64, or in float32 where its forward insists on that."""

    module: nn.Module
    dtype: torch.dtype

    def __call__(self, images: Tensor) -> Tensor:
        found = logits_of(self.module(own_copy(images.to(self.dtype))))
        if found is None:
            raise UnsupportedModel(
                f"the forward of {type(self.module).__name__} does not return one tensor of logits"
            )
        return found.double()


def _runner(module: nn.Module, images: Tensor) -> _Run:
    run = _Run(evaluation_copy(module, share=False).double(), torch.float64)
    try:
        run(images)
    except (RuntimeError, TypeError):
        return _Run(evaluation_copy(module, share=False).float(), torch.float32)
    return run


def _difference(program: Program, module: nn.Module, example: Tensor, name: str) -> tuple[float, float]:
    """Largest relative difference between the parent and the program with its tensors, and what rounding explains."""
    images = _images(program, example, module)
    run = _runner(module, images)
    tensors = state_of(program, run.module)
    state = {key: t.to(run.dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    errors = []
    for scale in (1.0, LARGE):
        batch = (scale * images).to(run.dtype)
        expected = run(batch)
        if scale == 1.0 and not bool(expected.isfinite().all()):
            raise NonFinite(
                f"parent {name} gives logits that are NaN or infinite for random images; its checkpoint is damaged or "
                "belongs to another model"
            )
        try:
            found = execute(program.graph, [state], [batch])[0].double()
        except RuntimeError as error:
            raise ArchitectureMismatch(
                f"the tensors of parent {name} do not run through the graph of the first parent: "
                f"{str(error).splitlines()[0][:200]}. Build both parents by the same definition."
            ) from error
        if found.shape != expected.shape:
            return float("inf"), SAME
        if bool(expected.isfinite().all()):
            errors.append(_relative(found, expected))
    return max(errors), SAME if run.dtype is torch.float64 else SAME_SINGLE


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-300)


# --- naming what differs ---


@dataclass(frozen=True)
class _Step:
    """One operation of a graph: its constants by name, which earlier steps it reads, and the module it stands in."""

    op: str
    constants: tuple[tuple[str, str], ...]
    reads: tuple[int, ...]
    module: str


def _first_difference(program: Program, module: nn.Module, example: Tensor, name: str, first: str) -> str:
    """In words: the first operation of the parent's own graph that is not the program's."""
    try:
        other = export_program(module, example) if program.added else export_program(module, example, ())
    except PleasError as error:
        return f"parent {name} cannot be traced ({error})"
    mine, theirs = _steps(program.graph), _steps(other.graph)
    for ours, its in zip(mine, theirs, strict=False):
        if (ours.op, ours.constants, ours.reads) == (its.op, its.constants, its.reads):
            continue
        where = f" (module {ours.module})" if ours.module else ""
        if ours.op != its.op:
            return f"parent {name} computes {its.op} where parent {first} computes {ours.op}{where}"
        if ours.constants == its.constants:
            return f"{ours.op} of parent {name} reads other values than that of parent {first}{where}"
        new, old = (
            ", ".join("=".join(pair) for pair in x if pair not in y) or "the default"
            for x, y in ((its.constants, ours.constants), (ours.constants, its.constants))
        )
        return f"parent {name} computes {its.op} with {new} where parent {first} has {old}{where}"
    if len(mine) != len(theirs):
        longer = first if len(mine) > len(theirs) else name
        step = max(mine, theirs, key=len)[min(len(mine), len(theirs))]
        return f"parent {longer} computes {step.op} where the other is done"
    return f"parent {name} has other constants than parent {first}: numbers or tensors that are no parameters"


def _steps(graph: fx.Graph) -> list[_Step]:
    place: dict[fx.Node, int] = {}
    steps: list[_Step] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        place[node] = len(steps)
        schema = getattr(node.target, "_schema", None)
        op = (
            f"aten.{schema.name.split('::')[-1]}"
            if schema
            else str(getattr(node.target, "__name__", node.target))
        )
        names = [argument.name for argument in schema.arguments] if schema else []
        given = {argument.name: argument.default_value for argument in schema.arguments} if schema else {}
        given |= {(names[i] if i < len(names) else str(i)): value for i, value in enumerate(node.args)}
        constants = [pair for key, value in (given | node.kwargs).items() if (pair := _constant(key, value))]
        reads = tuple(place.get(source, -1) for source in node.all_input_nodes)
        steps.append(_Step(op, tuple(constants), reads, module_path(node)))
    return steps


def _constant(key: str, value: Any) -> tuple[str, str] | None:
    """A constant argument as text; parameters have their names, other tensors and sizes none."""
    if isinstance(value, fx.Node):
        return (key, str(value.target)) if value.op == "get_attr" else None
    nodes = isinstance(value, list | tuple) and any(isinstance(v, fx.Node) for v in value)
    if nodes or value is None or isinstance(value, torch.device | torch.layout):
        return None
    return (key, f"{value:g}" if isinstance(value, float) else str(value))
