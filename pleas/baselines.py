"""What a merge is compared with: the ensemble; and what weight averages need, batch norms re-estimated."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pleas.heads import together
from pleas.layers.layer import BATCH_NORM
from pleas.settings import Heads
from pleas.symmetry import Symmetry


def has_batch_norm(symmetry: Symmetry) -> bool:
    """Whether the network normalises by running statistics anywhere."""
    return any(node.target is BATCH_NORM for node in symmetry.program.graph.nodes)


class Ensemble(nn.Module):
    """All parents side by side: the mean of their logits, with separate heads all of them, in order, or their union. As
    many times the cost.

    outputs: as in MergeSettings
    """

    def __init__(
        self,
        *parents: nn.Module,
        heads: Heads = "shared",
        outputs: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.parents, self.outputs = nn.ModuleList(parents), outputs
        self.heads: Heads = heads

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """others: the images as the second and further parents see them, where they normalise differently."""
        seen = (x, *others) if others else (x,) * len(self.parents)
        outputs = [parent(own) for parent, own in zip(self.parents, seen, strict=True)]
        return together(outputs, self.heads, self.outputs)


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
