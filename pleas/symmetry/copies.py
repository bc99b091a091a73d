"""Copies of networks that can be traced: without wrappers, without what an earlier call left behind."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from pleas.errors import UnsupportedModel
from pleas.symmetry.undisturbed import own_copy, undisturbed

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # hold a network as `module`
HOOKS: dict[str, type] = {
    "weight_norm": WeightNorm,
    "spectral_norm": SpectralNorm,
    "pruning": prune.BasePruningMethod,
}
PARAMETRISATIONS = {"_WeightNorm": "weight_norm", "_SpectralNorm": "spectral_norm"}


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside torch.compile(...), DataParallel(...), DistributedDataParallel and AveragedModel."""
    while (attribute := _held_as(model)) is not None:
        model = getattr(model, attribute)
    return model


def device_of(model: nn.Module) -> torch.device:
    """Where the tensors of a network are, by the first of them; the CPU for a network without any."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def plain(model: nn.Module) -> nn.Module:
    """The same function in evaluation mode, as plain weights: what is best handed to a merge.

    Wrappers are taken off. Weight norm, spectral norm, pruning and other parametrisations are folded into the weights
    they compute, in a copy; a model without any is returned itself. The buffers of a spectral norm belong to one
    weight and can be neither averaged nor permuted, so that `trace` asks for this.
    """
    model = unwrap(model)
    if not computed_weights(model):
        return model
    folded = evaluation_copy(model, share=False)
    with torch.no_grad():
        for name, module in list(folded.named_modules()):
            if "parametrizations" not in name.split("."):
                _fold(module)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in folded.named_modules():
        module.training = modes[name]
    return folded


def computed_weights(model: nn.Module) -> dict[str, str]:
    """Path of a module -> what computes its weight: weight_norm, spectral_norm, pruning, or the name of a class."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        lists: Iterable[Any] = getattr(module, "parametrizations", {}).values()
        kinds = [type(p).__name__ for ps in lists for p in ps] if parametrize.is_parametrized(module) else []
        kinds = [PARAMETRISATIONS.get(kind, kind) for kind in kinds]
        hooks = module._forward_pre_hooks.values()
        kinds += [kind for kind, known in HOOKS.items() if any(isinstance(h, known) for h in hooks)]
        if kinds:
            found[name] = " of ".join(kinds)
    return found


def evaluation_copy(model: nn.Module, *, share: bool) -> nn.Module:
    """A copy in evaluation mode, its wrappers replaced by modules that pass on; share: with the model's own tensors.

    Some models cache tensors in `forward` (LeViT: attention biases); an export would freeze the cache as a constant
    and hide the parameters behind it. Such caches are dropped on `train()`, hence the detour. Tensors that an earlier
    call stored and that hang on its gradient are copied without it. Raises UnsupportedModel where the model cannot be
    copied.
    """
    memo: dict[int, Any] = {}
    if share:
        memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for tensor in _stored_tensors(vars(module).values()):
            if not tensor.is_leaf:
                memo.setdefault(id(tensor), tensor.detach() if share else tensor.detach().clone())
    try:
        copied = copy.deepcopy(model, memo).train().eval()
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be copied, which tracing needs so as to leave it alone: "
            f"{type(error).__name__}: {str(error)[:200]}. Keep what cannot be copied (open files, locks, generators) "
            "outside the module, or give it a __deepcopy__."
        ) from error
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                hooks[key] = _with_own_cells(hook)
        for name, child in module.named_children():
            attribute = _held_as(child)
            if attribute is not None:
                module._modules[name] = PassesOn(attribute, getattr(child, attribute))
    return copied


class PassesOn(nn.Module):
    """Stands for a wrapper inside a network: the names of its parameters stay, nothing is compiled or scattered."""

    def __init__(self, attribute: str, inner: nn.Module) -> None:
        super().__init__()
        self.attribute = attribute
        self.add_module(attribute, inner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(self.attribute)(*args, **kwargs)


def drop_watching_hooks(copied: nn.Module, example: Tensor) -> list[str]:
    """Remove forward hooks that only watch: those that return nothing and leave the output alone in one call.

    `copied` is a copy of our own. What such hooks store (features for a plot, say) would be traced, or hold tensors of
    the tracer. Returns the paths of the modules that lost a hook.
    """
    owners = {name: module for name, module in copied.named_modules() if module._forward_hooks}
    if not owners:
        return []
    acting: set[int] = set()
    for module in owners.values():
        for key, hook in module._forward_hooks.items():
            module._forward_hooks[key] = _observed(hook, acting)
    with undisturbed(copied):
        copied(own_copy(example))
    dropped = []
    for name, module in owners.items():
        for key, observed in list(module._forward_hooks.items()):
            hook = observed.__wrapped__  # type: ignore[attr-defined]
            module._forward_hooks[key] = hook
            if id(hook) not in acting:
                del module._forward_hooks[key]
                dropped.append(name)
    return dropped


def _observed(hook: Callable[..., Any], acting: set[int]) -> Callable[..., Any]:
    def observed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outputs = list(_stored_tensors([args[-1]]))
        versions = [tensor._version for tensor in outputs]
        result = hook(module, *args, **kwargs)
        if result is not None or versions != [tensor._version for tensor in outputs]:
            acting.add(id(hook))
        return result

    observed.__wrapped__ = hook  # type: ignore[attr-defined]
    return observed


def _with_own_cells(hook: Any) -> Any:
    """A hook that is a closure keeps its list or dict of features: let the copy's hook fill one of its own."""
    if not isinstance(hook, types.FunctionType) or not hook.__closure__:
        return hook
    cells = []
    for cell in hook.__closure__:
        held = None if cell == types.CellType() else cell.cell_contents
        cells.append(types.CellType(copy.copy(held)) if isinstance(held, list | dict | set) else cell)
    ours = types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, tuple(cells))
    ours.__kwdefaults__ = hook.__kwdefaults__
    return ours


def _stored_tensors(values: Iterable[Any], depth: int = 4) -> Iterator[Tensor]:
    """Tensors among values, and in the lists, tuples and dicts among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth and isinstance(value, dict):
            yield from _stored_tensors(value.values(), depth - 1)
        elif depth and isinstance(value, list | tuple | set):
            yield from _stored_tensors(value, depth - 1)


def _held_as(model: nn.Module) -> str | None:
    """The attribute under which a wrapper holds its network; None where the model is no wrapper."""
    if type(model).__name__ == "OptimizedModule":  # of torch._dynamo, which takes a second to import
        return "_orig_mod"
    return "module" if isinstance(model, PARALLEL) else None


def _fold(module: nn.Module) -> None:
    """Replace what computes this module's weight by the weight."""
    if parametrize.is_parametrized(module):
        # Not by remove_parametrizations: it edits the class, which a copy has in common with its original.
        lists: Any = module.parametrizations
        values = {name: getattr(module, name).detach().clone() for name in lists}
        learnt = {name for name in lists if any(True for _ in lists[name].parameters(recurse=False))}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        for name, value in values.items():
            if name in learnt:
                module.register_parameter(name, nn.Parameter(value))
            else:
                module.register_buffer(name, value)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[arg-type]
