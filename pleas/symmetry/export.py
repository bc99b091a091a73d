"""From a module to one plain `torch.fx` graph of core ATen ops.

The graph is functional (in-place ops are gone), has one placeholder, the image batch, and names every
parameter and buffer by its state-dict key: any network of the same architecture can be run through it by
handing in its state dict. `aten.linear` and `aten.scaled_dot_product_attention` are kept whole, which is
faster to run and easier to read.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from pleas.errors import InputError, UnsupportedModel
from pleas.symmetry.copies import computed_weights, device_of, drop_watching_hooks, evaluation_copy, unwrap
from pleas.symmetry.factories import constants_for_factories
from pleas.symmetry.program import Program, execute, logits_of, named_tensors, state_of
from pleas.symmetry.rewrites import REWRITES, module_path
from pleas.symmetry.rules import op_name
from pleas.symmetry.undisturbed import own_copy, undisturbed

__all__ = ["Program", "execute", "export_program", "logits_of", "state_of"]

aten = torch.ops.aten

KEPT_WHOLE = (aten.linear.default, aten.scaled_dot_product_attention.default)
QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
LARGE_CONSTANT = 1024  # elements; a lifted float constant above this is mentioned in the notes


def export_program(model: nn.Module, example: Tensor, rewrites: Sequence[str] = ("pad_to_conv",)) -> Program:
    """Export `model` in evaluation mode on an image batch `example` (N, C, H, W), N >= 1.

    The model itself is not touched: a copy that shares its tensors is exported, without the wrappers of torch.compile
    and DataParallel. Raises UnsupportedModel, in one sentence, when the forward cannot be exported, changes its own
    buffers, or does not return one tensor.
    """
    unknown = [name for name in rewrites if name not in REWRITES]
    if unknown:
        raise UnsupportedModel(f"unknown rewrite {unknown[0]!r}; known rewrites: {', '.join(REWRITES)}")
    notes = []
    if isinstance(model, nn.Module) and unwrap(model) is not model:
        notes.append(
            f"{type(model).__name__} is a wrapper: the {type(unwrap(model)).__name__} inside is merged."
        )
        model = unwrap(model)
    _check_model(model, example)
    example = example.to(device_of(model))
    with undisturbed(model):
        copied = evaluation_copy(model, share=True)
        try:
            watched = drop_watching_hooks(copied, example)
            if any(t.is_floating_point() and t.dtype != example.dtype for t in model.parameters()):
                with undisturbed(copied):  # export's stand-ins for tensors do not mind how precisions meet
                    copied(own_copy(example))
        except Exception as error:
            raise _unexportable(copied, example, error, "cannot be run") from error
        notes += [
            f"The forward hook of {name or 'the model'} only watches: it is left out." for name in watched
        ]
        exported, fixed = _export(copied, example)
        program = _plain_program(exported, model, notes + fixed)
    for name in rewrites:
        program = REWRITES[name](program)
    return program


def _check_model(model: Any, example: Any) -> None:
    """Refuse what can be seen to be untraceable without a forward."""
    if not isinstance(example, Tensor) or example.dim() < 2 or example.shape[0] < 1:
        what = f"of shape {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise InputError(
            f"the example must be a batch of images, a tensor (N, C, H, W) with N >= 1; it is {what}"
        )
    name, remedy = type(model).__name__, ""
    if not isinstance(model, nn.Module):
        remedy = "is no torch.nn.Module: give the network itself, not a function or a class"
    elif isinstance(model, torch.jit.ScriptModule):
        remedy = "is a compiled TorchScript module: give the torch.nn.Module that it was compiled from"
    elif quantised := [
        key for key, part in model.named_modules() if type(part).__module__.startswith(QUANTISED)
    ]:
        remedy = f"is quantised ({quantised[0]}): give the network in floating point that it was made from"
    else:
        tensors = named_tensors(model)
        lazy = [key for key, tensor in tensors.items() if nn.parameter.is_lazy(tensor)]
        meta = [key for key, tensor in tensors.items() if tensor.is_meta]
        spectral = [key for key, kind in computed_weights(model).items() if "spectral_norm" in kind]
        if lazy:
            remedy = f"has parameters without a shape ({lazy[0]}): run it on one batch of images first"
        elif meta:
            remedy = f"has tensors without values, on the meta device ({meta[0]}): load its weights first"
        elif spectral:
            remedy = (
                f"normalises the weight of {spectral[0] or 'the model'} by buffers that belong to it alone "
                "(spectral_norm): fold it into a plain weight by pleas.symmetry.plain(model), and merge that"
            )
    if remedy:
        raise UnsupportedModel(f"{name} {remedy}")


def _export(model: nn.Module, example: Tensor) -> tuple[ExportedProgram, list[str]]:
    """Core ATen, with a symbolic batch size where the model allows it.

    Whatever the forward raises is the forward's: it is reported with its place, and its traceback as the cause.
    """
    if example.shape[0] < 2:
        example = example.repeat(2, *[1] * (example.dim() - 1))  # export treats sizes 0 and 1 as special
    auto = {0: torch.export.Dim.AUTO}
    notes: list[str] = []
    with _quiet_exporter():
        try:
            return _decomposed(torch.export.export(model, (example,), dynamic_shapes=(auto,))), notes
        except Exception as error:  # noqa: BLE001 - the second try reports what is wrong with the forward
            notes.append(f"The batch size is fixed at export: {_first_line(error)}.")
        try:
            return _decomposed(torch.export.export(model, (example,))), notes
        except Exception as error:
            raise _unexportable(model, example, error) from error


def _decomposed(exported: ExportedProgram) -> ExportedProgram:
    table = torch.export.default_decompositions()
    for op in KEPT_WHOLE:
        table.pop(op, None)
    return exported.run_decompositions(table)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """What the exporter logs and prints on failure (graphs, pages long), the error says in one sentence."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            # of the copy that is exported, which nobody sees again
            warnings.filterwarnings("ignore", ".*assigned during export", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# What the text of an exporter's error tells about its cause, and what helps; the first that fits.
CAUSES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("data-dependent", "DataDependent", "is_nonzero", "Could not guard", "Could not extract specialized"),
        "Usually this means control flow that depends on tensor values; choose by torch.where, or only in training "
        "(`if self.training`).",
    ),
    (
        (".numpy()", "numpy", "from_numpy"),
        "The forward leaves torch for numpy; write this step with torch functions.",
    ),
    (
        ("takes", "missing", "positional argument", "unexpected keyword"),
        "Usually this means a forward that takes something other than one image tensor; wrap it in a module that does.",
    ),
    (
        ("should be the same", "same dtype", "expected scalar type", "Half", "BFloat16"),
        "The images and the weights have different precisions; convert the network by .float().",
    ),
    (
        ("SpecViolationError", "constant", "attributes", "mutat"),
        "Usually this means that the forward makes or replaces modules, parameters or stored tensors; make them in "
        "__init__.",
    ),
    (
        ("shape", "size", "dimension", "channels", "AssertionError"),
        "Usually the images have another size or number of channels than the network is made for.",
    ),
)
OTHERWISE = (
    "Usually this means control flow that depends on tensor values, or a forward that takes something other than "
    "one image tensor."
)


def _unexportable(model: nn.Module, example: Tensor, error: Exception, what: str = "") -> UnsupportedModel:
    """Why export failed, and where in the module tree, as far as the traceback tells."""
    first = _first_line(error)
    subject = f"the forward of {type(model).__name__}"
    message = f"{subject} {what}" if what else f"torch.export cannot follow {subject}"
    message += f" on one image batch of shape {tuple(example.shape)}: {first}"
    helps = next((advice for words, advice in CAUSES if any(word in first for word in words)), OTHERWISE)
    names = {id(module): name for name, module in model.named_modules()}
    frames = [
        frame
        for frame in traceback.walk_tb(error.__traceback__)
        if frame[0].f_code.co_name == "forward" and id(frame[0].f_locals.get("self")) in names
    ]
    if not frames:
        return UnsupportedModel(f"{message}. {helps}")
    frame, line = frames[-1]
    module = frame.f_locals["self"]
    name, file = names[id(module)], frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
    code = traceback.StackSummary.extract(iter([(frame, line)]))[0].line or ""
    where = f"module {name!r}" if name else "the model's own forward"
    parameters = [f"{name}.{key}" if name else key for key, _ in module.named_parameters()]
    operation = {"op": code, "node": "", "module": name, "parameters": parameters, "help": helps}
    return UnsupportedModel(f"{message}, in {where} ({file}, line {line}: `{code}`). {helps}", [operation])


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200].rstrip('.')}" if lines else type(error).__name__


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Further name -> first name, for every tensor that the module reaches under several names."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in named_tensors(model).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return tied


def _plain_program(exported: ExportedProgram, model: nn.Module, notes: list[str]) -> Program:
    """Turn lifted inputs back into get_attr nodes, drop guards, keep one placeholder and one output."""
    owner = type(model).__name__
    tied = _tied_names(model)
    tensors = named_tensors(model)
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    constants: dict[str, Tensor] = {}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
            target = str(specs[node.name].target)
            if target not in tensors:
                value: Any = exported.constants[target]
                target = f"constants.{target}"
                constants[target] = value.detach()
            copies[node] = graph.create_node("get_attr", tied.get(target, target))
            copies[node].meta = dict(node.meta)
        elif node.op == "output":
            result = _single_output(exported, node, owner, notes)
            graph.output(copies[result])
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    _merge_duplicates(graph)
    _drop_noops(graph)
    _check_deterministic(graph, owner)
    factories = constants_for_factories(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1 or not isinstance(placeholders[0].meta["val"], Tensor):
        raise UnsupportedModel(f"the forward of {owner} must take exactly one tensor, a batch of images")
    used = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    constants = {name: value for name, value in constants.items() if name in used}
    notes += [
        f"{name[len('constants.') :]} {tuple(value.shape)} is a constant of the graph, not a parameter: "
        "it is the same for every parent."
        for name, value in constants.items()
        if value.is_floating_point() and value.numel() > LARGE_CONSTANT
    ]
    constants |= factories
    batch = _check_rows(graph, placeholders[0], owner)
    if batch is not None and not any(note.startswith("The batch size") for note in notes):
        notes.append(f"The batch size is fixed at {batch} by the forward of {owner}.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return Program(
        graph=graph,
        parameters=tuple(name for name in used if name in parameters),
        buffers=tuple(name for name in used if name in tensors and name not in parameters),
        constants=constants,
        tied={name: first for name, first in tied.items() if first in used},
        notes=tuple(notes),
        batch=batch,
    )


def _check_deterministic(graph: fx.Graph, owner: str) -> None:
    """Refuse a graph that draws random numbers (an attention without dropout is only tagged as if it did)."""
    for node in graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", [])
        if not random or (
            node.target is aten.scaled_dot_product_attention.default and not node.args[4:5] > (0,)
        ):
            continue
        where = f"in module {module_path(node)!r}" if module_path(node) else "in the model's own forward"
        raise UnsupportedModel(
            f"the forward of {owner} draws random numbers even in evaluation mode ({op_name(node.target)}, {where}); "
            "a network to merge must be a function of its input: use nn.Dropout, or F.dropout(..., "
            "training=self.training)"
        )


def _check_rows(graph: fx.Graph, images: fx.Node, owner: str) -> int | None:
    """The batch size baked into the graph, None if symbolic; the logits must have one row per image.

    Sizes are compared as text: comparing symbols would make export's shape environment specialise them.
    """
    result: Any = next(iter(reversed(graph.nodes))).args[0]
    rows, shape = str(images.meta["val"].shape[0]), [str(size) for size in result.meta["val"].shape]
    if not shape or shape[0] != rows:
        raise UnsupportedModel(
            f"the forward of {owner} must return one row per image, but its output has shape "
            f"({', '.join(shape)}) for a batch of {rows}"
        )
    return int(rows) if rows.isdigit() else None


def _single_output(exported: ExportedProgram, output: fx.Node, owner: str, notes: list[str]) -> fx.Node:
    """The node of the logits among everything the exported graph returns."""
    specs = exported.graph_signature.output_specs
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    changed = [spec.target for spec in specs if spec.kind is OutputKind.BUFFER_MUTATION]
    if changed:
        raise UnsupportedModel(
            f"the forward of {owner} changes its buffer {changed[0]!r} even in evaluation mode; "
            "a network to merge must be a function of its input"
        )
    values = [node for node, spec in zip(results, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
    # Rebuild the user's own structure from stand-ins: that is how `logits` is found by name.
    stand_ins = [torch.empty(0) if isinstance(node, fx.Node) else node for node in values]
    structure = pytree.tree_unflatten(stand_ins, exported.call_spec.out_spec)  # type: ignore[arg-type]
    chosen = logits_of(structure)
    if chosen is None:
        raise UnsupportedModel(
            f"the forward of {owner} returns {type(structure).__name__} with {len(values)} entries; it must return "
            "one tensor of logits, or a mapping with an entry `logits`"
        )
    if not isinstance(structure, Tensor):
        notes.append(
            f"The forward of {owner} returns a {type(structure).__name__}; only its logits are kept."
        )
    return values[next(i for i, value in enumerate(stand_ins) if value is chosen)]


def _merge_duplicates(graph: fx.Graph) -> None:
    """One get_attr per name (a tied tensor arrives under each of its names), placed first in the graph."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            keeper = first.setdefault(str(node.target), node)
            if keeper is not node:
                node.replace_all_uses_with(keeper)
                graph.erase_node(node)


def _drop_noops(graph: fx.Graph) -> None:
    """Remove guards, unread values and slices that keep everything.

    The graph is functional, so an unread value can have no effect: what goes here are assertions on shapes.
    """
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and _keeps_everything(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _keeps_everything(node: fx.Node) -> bool:
    source, dim, start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    size = source.meta["val"].shape[dim]  # type: ignore[union-attr]
    whole = end is None or end == torch.iinfo(torch.int64).max or (isinstance(size, int) and end == size)
    return bool(start in (None, 0) and whole and step == 1)
