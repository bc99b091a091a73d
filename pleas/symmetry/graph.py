"""From a module to one plain `torch.fx` graph of core ATen ops.

The graph is functional (in-place ops are gone), has one placeholder, the image batch, and names every
parameter and buffer by its state-dict key: any network of the same architecture can be run through it by
handing in its state dict. `aten.linear` and `aten.scaled_dot_product_attention` are kept whole, which is
faster to run and easier to read.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from pleas.errors import UnsupportedModel
from pleas.symmetry.program import Program, execute, logits_of, named_tensors, state_of
from pleas.symmetry.rewrites import REWRITES

__all__ = ["Program", "execute", "export_program", "logits_of", "state_of"]

aten = torch.ops.aten

KEPT_WHOLE = (aten.linear.default, aten.scaled_dot_product_attention.default)
# What torch.export raises when it cannot follow a forward: its own errors are RuntimeErrors, the model's are the rest.
EXPORT_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError)
LARGE_CONSTANT = 1024  # elements; a lifted float constant above this is mentioned in the notes


def export_program(model: nn.Module, example: Tensor, rewrites: Sequence[str] = ("pad_to_conv",)) -> Program:
    """Export `model` in evaluation mode on an image batch `example` (N, C, H, W), N >= 1.

    The model itself is not touched: a copy that shares its tensors is exported. Raises UnsupportedModel, in one
    sentence, when the forward cannot be exported, changes its own buffers, or does not return one tensor.
    """
    unknown = [name for name in rewrites if name not in REWRITES]
    if unknown:
        raise UnsupportedModel(f"unknown rewrite {unknown[0]!r}; known rewrites: {', '.join(REWRITES)}")
    exported, notes = _export(_fresh_copy(model), example)
    program = _plain_program(exported, model, notes)
    for name in rewrites:
        program = REWRITES[name](program)
    return program


def _fresh_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares the parent's tensors.

    Some models cache tensors in `forward` (LeViT: attention biases); an export would freeze the cache as a constant
    and hide the parameters behind it. Such caches are dropped on `train()`, hence the detour.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).train().eval()


def _export(model: nn.Module, example: Tensor) -> tuple[ExportedProgram, list[str]]:
    """Core ATen, with a symbolic batch size where the model allows it."""
    if example.shape[0] < 2:
        example = example.repeat(2, *[1] * (example.dim() - 1))  # export treats sizes 0 and 1 as special
    auto = ({0: torch.export.Dim.AUTO},)
    notes: list[str] = []
    with torch.no_grad():
        try:
            exported = torch.export.export(model, (example,), dynamic_shapes=auto)
        except EXPORT_ERRORS as dynamic_error:
            try:
                exported = torch.export.export(model, (example,))
            except EXPORT_ERRORS as error:
                raise _unexportable(model, example, error) from error
            notes.append(f"The batch size is fixed at export: {_first_line(dynamic_error)}.")
        table = torch.export.default_decompositions()
        for op in KEPT_WHOLE:
            table.pop(op, None)
        return exported.run_decompositions(table), notes


def _unexportable(model: nn.Module, example: Tensor, error: Exception) -> UnsupportedModel:
    """Why export failed, and where in the module tree, as far as the traceback tells."""
    message = (
        f"torch.export cannot follow the forward of {type(model).__name__} on one image batch of shape "
        f"{tuple(example.shape)}: {_first_line(error)}"
    )
    helps = (
        "Usually this means control flow that depends on tensor values, or a forward that takes something other than "
        "one image tensor."
    )
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
