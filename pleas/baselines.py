"""What a merge is compared with: the ensemble, the plain average and the permutation alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pleas.errors import InputError
from pleas.layers import BATCH_NORM
from pleas.symmetry import Permutation, Symmetry, permute_state, state_of


class Ensemble(nn.Module):
    """Both parents side by side: the mean of their logits, or with separate heads both, A's first. Twice the
    cost."""

    def __init__(self, a: nn.Module, b: nn.Module, heads: str = "shared") -> None:
        super().__init__()
        self.a, self.b, self.heads = a, b, heads

    def forward(self, x: Tensor, x_b: Tensor | None = None) -> Tensor:
        """x_b: the images as B sees them, where the parents normalise differently."""
        outputs = self.a(x), self.b(x if x_b is None else x_b)
        return torch.cat(outputs, -1) if self.heads == "separate" else (outputs[0] + outputs[1]) / 2


def plain_average(symmetry: Symmetry, a: nn.Module, b: nn.Module) -> nn.Module:
    """The mean of the parents' weights, unit by unit as they come: the baseline that usually fails."""
    return _average(symmetry, a, state_of(symmetry.program, b))


def permutation_only(symmetry: Symmetry, matching: Permutation, a: nn.Module, b: nn.Module) -> nn.Module:
    """The mean of A's weights and B's matched ones (Git Re-Basin, without least squares)."""
    return _average(symmetry, a, permute_state(symmetry, state_of(symmetry.program, b), matching))


def _average(symmetry: Symmetry, a: nn.Module, b: Mapping[str, Tensor]) -> nn.Module:
    program = symmetry.program
    merged = copy.deepcopy(a)
    state = merged.state_dict()
    for name in (*program.parameters, *program.buffers):
        if name in program.added or not state[name].is_floating_point():
            continue
        if state[name].shape != b[name].shape:
            raise InputError(
                f"'{name}' is {tuple(state[name].shape)} in A and {tuple(b[name].shape)} in B: "
                "weights of different shapes have no average. With different label sets, average the "
                "parents without their heads."
            )
        state[name] = (state[name] + b[name]) / 2
    merged.load_state_dict(state)
    return merged.eval()


def reestimate_bn(module: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of the module with batch-norm statistics re-estimated on the images (exact mean over batches).

    Weight averages need it: averaged units lose variance (REPAIR, arXiv 2211.08403).
    """
    module = copy.deepcopy(module)
    with torch.no_grad():
        if isinstance(module, fx.GraphModule):
            _reestimate_graph(module, batches)
        else:
            _reestimate_modules(module, batches)
    return module


def _reestimate_modules(module: nn.Module, batches: Iterable[Tensor]) -> None:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    modes = [m.training for m in module.modules()]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        norm.train()
    for batch in batches:
        module(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for m, mode in zip(module.modules(), modes, strict=True):
        m.training = mode


def _reestimate_graph(module: fx.GraphModule, batches: Iterable[Tensor]) -> None:
    """The same for a merged network, whose batch norms are nodes of its graph."""
    observer = _NormObserver(module)
    for batch in batches:
        observer.run(batch)
    buffers = dict(module.named_buffers())
    for (mean, var), (total_mean, total_var, count) in observer.totals.items():
        buffers[mean].copy_(total_mean / count)
        buffers[var].copy_(total_var / count)


class _NormObserver(fx.Interpreter):
    """Runs a graph with every batch norm on its batch's own statistics, and sums those up."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.totals: dict[tuple[str, str], tuple[Tensor, Tensor, int]] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.target is not BATCH_NORM:
            return super().run_node(n)
        x, weight, bias, _, _, _, eps = self.fetch_args_kwargs_from_env(n)[0]
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, dims)
        names = (str(n.args[3].target), str(n.args[4].target))  # type: ignore[union-attr]
        old_mean, old_var, count = self.totals.get(names, (torch.zeros_like(mean), torch.zeros_like(var), 0))
        self.totals[names] = (old_mean + mean, old_var + var, count + 1)
        return (F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var)
