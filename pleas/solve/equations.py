"""Normal equations -> layer: the closed-form least squares of PLeaS (arXiv 2407.02447, eq. 3) for any plan.

A merged layer `y = W z + b` is fitted to targets `t` on rows `z`, both over merged positions. What is summed up is the
problem about its prior, the partial merge: `W = P + D`, and `D` is fitted to what the prior leaves, `e = t - P z - p`.
Where the prior is exact (parents that are copies of each other, everything kept apart) `e` is rounding and so is `D`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pleas.errors import TooFewRows
from pleas.layers.layer import Layer, has_intercept, is_wide
from pleas.plan.blocks import Block, partial_merge
from pleas.plan.layout import Layout
from pleas.ridge import dead_positions, dual_ridge, ridge_solve
from pleas.statistics.moments import add_products, symmetric

MAX_ROWS = 4096  # rows kept at most, the first ones seen
LARGE = 2048  # unknowns above which a layer's sums are kept in float32 (a Gram matrix of 4,608 takes 85 MB)


@dataclass(frozen=True)
class LayerSolution:
    """A solved layer and the evidence for it.

    weight:   (out, d_in) canonical layout over merged positions, structural zeros included (grouped: one
        group's inputs)
    bias:     (out,)
    mean, variance: (out,) of the layer's output on the rows it was solved on
    residual: (out,) E (W z + b - t)^2
    target:   (out,) variance of the target
    rows:     rows the problem was made of
    dead:     input positions without variance; they keep the partial-merge weights
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    residual: Tensor
    target: Tensor
    rows: int
    dead: Tensor

    @property
    def relative_residual(self) -> float:
        """Residual over the target's variance, summed over units."""
        return float(self.residual.sum() / self.target.sum().clamp_min(torch.finfo(torch.float64).tiny))


@dataclass(frozen=True)
class Prior:
    """The partial merge of a layer: weight (groups, o, d), bias (groups, o), float64; groups is 1 but for grouped
    convolutions."""

    weight: Tensor
    bias: Tensor

    def left(self, z: Tensor, t: Tensor) -> Tensor:
        """What the prior leaves of targets (groups, n, o) on rows (groups, n, d)."""
        return t - z @ self.weight.to(z).mT - self.bias.to(z)[:, None]


def prior_of(
    layer: Layer, parents: Sequence[tuple[Tensor, Tensor]], inputs: Layout, outputs: Layout
) -> Prior:
    """From every aligned parent's weight (o, d_in) and bias (o,) in the canonical layout."""
    if layer.groups > 1:
        return _grouped_prior(layer, parents, outputs)
    weight = partial_merge([w.unflatten(1, (layer.taps, -1)) for w, _ in parents], inputs, outputs)
    bias = weight.new_zeros(outputs.size)
    for parent, (_, own) in enumerate(parents):
        bias += outputs.mixing(parent).to(own) * own[outputs.sources[parent].clamp_max(len(own) - 1)]
    return Prior(weight.flatten(1)[None], bias[None])


def _grouped_prior(layer: Layer, parents: Sequence[tuple[Tensor, Tensor]], outputs: Layout) -> Prior:
    per_out = layer.out_units // layer.groups
    weight, bias = parents[0][0].new_zeros(()), parents[0][0].new_zeros(())
    for parent, (own, shift) in enumerate(parents):
        group = (outputs.sources[parent] // per_out)[::per_out]
        share = outputs.mixing(parent)[::per_out].to(own)
        weight = weight + share[:, None, None] * own.unflatten(0, (layer.groups, per_out))[group]
        bias = bias + share[:, None] * shift.unflatten(0, (layer.groups, per_out))[group]
    return Prior(weight, bias)


@dataclass
class Equations:
    """Streaming sums of one layer's problem about its prior: rows (groups, n, d) and targets (groups, n, o).

    Products are taken in the rows' precision per batch and summed in float64 (float32 for very large layers), about a
    shift close to the mean.
    """

    layer: Layer
    prior: Prior
    count: int = 0
    total: float = 0.0  # of what the rows count
    _shift: Tensor = field(default_factory=lambda: torch.empty(0))
    _first: Tensor = field(default_factory=lambda: torch.empty(0))
    _gram: Tensor = field(default_factory=lambda: torch.empty(0))
    _cross: Tensor = field(default_factory=lambda: torch.empty(0))
    _left: Tensor = field(default_factory=lambda: torch.empty(0))  # (2, groups, o): sums of e and e^2
    _target: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # (2, groups, o): sums of t - shift and its square
    _target_shift: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, z: Tensor, t: Tensor, shares: Tensor | None = None) -> None:
        """A batch of rows and their targets; shares: (n,) how much each row counts, not negative."""
        left = self.prior.left(z, t)
        if not self.count:
            self._start(z, t)
        centred, target = z - self._shift[:, None].to(z), t - self._target_shift[:, None].to(t)
        self.count += z.shape[1]
        self.total += z.shape[1] if shares is None else float(shares.double().sum())
        if shares is not None:  # every sum is of products of two of these, or of one and a root
            root = shares.to(z).sqrt()[:, None]
            self._add(centred * root, left * root, target * root, root)
        else:
            self._add(centred, left, target, None)

    def _add(self, centred: Tensor, left: Tensor, target: Tensor, root: Tensor | None) -> None:
        self._first += (centred if root is None else centred * root).sum(1, dtype=torch.float64)
        self._cross += left.mT @ centred
        add_products(self._gram, centred)
        for sums, values in ((self._left, left), (self._target, target)):
            sums[0] += (values if root is None else values * root).sum(1, dtype=torch.float64)
            sums[1] += values.square().sum(1, dtype=torch.float64)

    @property
    def _n(self) -> float:
        return self.total if self.total > 0 else 1.0

    def _start(self, z: Tensor, t: Tensor) -> None:
        groups, _, d = z.shape
        self._shift, self._target_shift = z.mean(1).double(), t.mean(1).double()
        kind = torch.float32 if d > LARGE else torch.float64
        self._first = self._shift.new_zeros((groups, d))
        self._gram = self._shift.new_zeros((groups, d, d), dtype=kind)
        self._cross = self._shift.new_zeros((groups, t.shape[2], d))
        self._left, self._target = (self._shift.new_zeros((2, groups, t.shape[2])) for _ in "et")

    def solve(self, blocks: Sequence[Block], ridge: float, min_rows: float) -> LayerSolution:
        """Minimise `E|W z + b - t|^2 + ridge * mean(diag Cov z) * |W - prior|^2` block by block.

        A layer without a bias of its own is solved about the origin instead of about the mean. Raises TooFewRows,
        NonFinite.
        """
        layer, n = self.layer, self._n
        check_rows(
            layer, self.count, layer.taps * _most(blocks) if layer.groups == 1 else layer.d_in, min_rows
        )
        intercept = has_intercept(layer)
        offset, mean_left = (self._first / n).cpu(), (self._left[0] / n).cpu()
        mean = self._shift.cpu() + offset
        gram = symmetric(self._gram.cpu()).double() / n - offset[:, :, None] * offset[:, None, :]
        cross = self._cross.cpu() / n - mean_left[:, :, None] * offset[:, None, :]
        about = gram, cross
        if not intercept:
            about = (
                gram + mean[:, :, None] * mean[:, None, :],
                cross + mean_left[:, :, None] * mean[:, None, :],
            )
        step = _block_steps(*about, blocks, layer, ridge)
        prior = Prior(self.prior.weight.cpu(), self.prior.bias.cpu())
        weight = prior.weight + step
        moved = (step @ mean[:, :, None])[..., 0]
        bias = prior.bias + mean_left - moved if intercept else prior.bias
        error = mean_left - moved - (bias - prior.bias)
        spread = (self._left[1] / n).cpu() - mean_left.square()
        residual = spread - 2 * (step * cross).sum(-1) + ((step @ gram) * step).sum(-1) + error.square()
        target_mean = (self._target[0] / n).cpu()
        return LayerSolution(
            weight=weight.flatten(0, 1),
            bias=bias.flatten(),
            mean=((weight @ mean[:, :, None])[..., 0] + bias).flatten(),
            variance=((weight @ gram) * weight).sum(-1).clamp_min(0).flatten(),
            residual=residual.clamp_min(0).flatten(),
            target=((self._target[1] / n).cpu() - target_mean.square()).clamp_min(0).flatten(),
            rows=self.count,
            dead=dead_positions(
                gram.diagonal(dim1=1, dim2=2).unflatten(1, (layer.taps, -1)).sum(1).flatten()
            ),
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Cov z, (d, d), and E z, (d,), of an ungrouped layer."""
        n = self._n
        offset = (self._first / n).cpu()
        gram = symmetric(self._gram.cpu()).double() / n - offset[:, :, None] * offset[:, None, :]
        return gram[0], (self._shift.cpu() + offset)[0]

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """E |W z + b - t|^2 on these rows, summed over the outputs of an ungrouped layer."""
        gram, mean = self.moments()
        n = self._n
        left, offset = (self._left[0, 0] / n).cpu(), (self._first[0] / n).cpu()
        cross = (self._cross[0] / n).cpu() - torch.outer(left, offset)
        step = weight - self.prior.weight[0].cpu()
        miss = step @ mean + bias - self.prior.bias[0].cpu() - left
        spread = (self._left[1, 0] / n).cpu() - left.square()
        residual = spread - 2 * (step * cross).sum(-1) + ((step @ gram) * step).sum(-1) + miss.square()
        return float(residual.clamp_min(0).sum())


@dataclass
class KeptRows:
    """The same for linear layers too wide for a Gram matrix (VGG's first reads 25,088 inputs): the first MAX_ROWS rows
    are kept, and the ridge problem is solved in its dual form, over rows."""

    layer: Layer
    prior: Prior
    count: int = 0
    _rows: list[Tensor] = field(default_factory=list)
    _targets: list[Tensor] = field(default_factory=list)

    def add(self, z: Tensor, t: Tensor) -> None:
        wanted = MAX_ROWS - self.count
        if wanted > 0:
            self._rows.append(z[0, :wanted].float().cpu())
            self._targets.append(t[0, :wanted].float().cpu())
            self.count += len(self._rows[-1])

    def solve(self, blocks: Sequence[Block], ridge: float, min_rows: float) -> LayerSolution:
        """As `Equations.solve`. Fewer rows than unknowns are the rule here, so min_rows counts against MAX_ROWS."""
        layer = self.layer
        check_rows(layer, self.count, min(layer.d_in, MAX_ROWS), min_rows)
        z, t = torch.cat(self._rows), torch.cat(self._targets)
        prior = Prior(self.prior.weight.cpu(), self.prior.bias.cpu())
        left = prior.left(z[None], t[None])[0].double()
        intercept = has_intercept(layer)
        mean_in = z.mean(0).double() if intercept else z.new_zeros(z.shape[1], dtype=torch.float64)
        mean_left = left.mean(0) if intercept else torch.zeros_like(left[0])
        centred = z - mean_in.float()
        step = torch.zeros_like(prior.weight[0])
        for block in blocks:
            found = dual_ridge(
                centred[:, block.columns], (left - mean_left)[:, block.rows], ridge, layer.name
            )
            step[block.rows[:, None], block.columns] = found
        weight = prior.weight[0] + step
        bias = prior.bias[0] + mean_left - step @ mean_in if intercept else prior.bias[0]
        predicted = (z @ weight.T.float()).double() + bias
        return LayerSolution(
            weight=weight,
            bias=bias,
            mean=predicted.mean(0),
            variance=predicted.var(0, unbiased=False),
            residual=(predicted - t).square().mean(0),
            target=t.double().var(0, unbiased=False),
            rows=self.count,
            dead=dead_positions(centred.square().mean(0)),
        )


def equations_of(layer: Layer, prior: Prior) -> Equations | KeptRows:
    """Empty sums for a layer, in the form that suits its size."""
    return (KeptRows if is_wide(layer) else Equations)(layer, prior)


def _most(blocks: Sequence[Block]) -> int:
    return max(len(block.columns) for block in blocks)


def _block_steps(gram: Tensor, cross: Tensor, blocks: Sequence[Block], layer: Layer, ridge: float) -> Tensor:
    if layer.groups > 1:
        return ridge_solve(gram, cross, torch.zeros_like(cross), ridge, layer.name)
    step = torch.zeros_like(cross)
    channels = gram.shape[-1] // layer.taps
    for block in blocks:
        columns = (torch.arange(layer.taps)[:, None] * channels + block.columns).flatten()
        part = cross[0][block.rows][:, columns]
        found = ridge_solve(gram[0][columns][:, columns], part, torch.zeros_like(part), ridge, layer.name)
        step[0, block.rows[:, None], columns] = found
    return step


def check_rows(layer: Layer, rows: int, unknowns: int, min_rows: float) -> None:
    """Refuse a layer whose rows are too few even with the ridge's help."""
    if rows < min_rows * unknowns:
        needed = int(min_rows * unknowns) + 1
        raise TooFewRows(
            f"layer '{layer.name}': {rows} rows for {unknowns} unknowns per output (rank at most {rows}, at least "
            f"{needed} rows are required). Give more proxy images, raise positions, or lower min_rows to lean on "
            "the ridge."
        )
