"""One layer's least squares: streamed, in blocks, against dense least squares on the stacked rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pleas.layers.layer
import pleas.solve.equations
from pleas.errors import NonFinite, TooFewRows
from pleas.layers.layer import BatchNorm, Layer, is_wide
from pleas.plan.blocks import Block, blocks_of
from pleas.plan.layout import ClassPlan, Layout, everyone, lay_out
from pleas.ridge import damped_solve, dead_positions, ridge_solve
from pleas.solve.equations import Equations, KeptRows, LayerSolution, Prior, equations_of, prior_of
from pleas.solve.propagate import merged_layer
from pleas.symmetry import DimUnits
from tests.reference import ridge_by_lstsq

F64: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
IN, OUT = 5, 4  # units of the parents' inputs and outputs
PLANS: list[
    tuple[int, list[list[int]], list[list[int]]]
] = [  # parents, the masks of every input and of every output
    (2, [[3]] * IN, [[3]] * OUT),
    (2, [[3], [1, 2], [3], [1, 2], [3]], [[1, 2], [3], [3], [3]]),
    (2, [[1, 2]] * IN, [[1, 2]] * OUT),
    (2, [[3], [3], [1, 2], [3], [3]], [[3]] * OUT),
    (2, [[3]] * IN, [[3], [1, 2], [1, 2], [3]]),
    (3, [[7], [1, 2, 4], [3, 4], [5, 2], [7]], [[6, 1], [7], [1, 2, 4], [3, 4]]),
    (3, [[1, 2, 4]] * IN, [[1, 2, 4]] * OUT),
]


def axis(partitions: list[list[int]], parents: int) -> Layout:
    size = len(partitions)
    units = DimUnits(torch.zeros(size, dtype=torch.int64), torch.arange(size))
    return lay_out(units, {0: ClassPlan.of(partitions, parents)}, parents)


class Setting:
    """Parents' layers, their input rows, and what merging them for a plan means row by row."""

    def __init__(
        self,
        parents: int,
        inputs: list[list[int]],
        outputs: list[list[int]],
        *,
        bias: bool = True,
        taps: int = 1,
        rows: int = 300,
    ) -> None:
        torch.manual_seed(0)
        self.taps = taps
        layer = Layer("fc", ("fc",), "fc.weight", "fc.bias" if bias else None, taps, IN, OUT)
        common = torch.randn(rows, taps, IN).double() + 1
        self.rows = [common + 0.7 * torch.randn(rows, taps, IN).double() for _ in range(parents)]
        self.parents = [
            (torch.randn(OUT, taps * IN).double(), torch.randn(OUT).double() * bias) for _ in range(parents)
        ]
        self.inputs, self.outputs = axis(inputs, parents), axis(outputs, parents)
        self.blocks = blocks_of(layer, self.inputs, self.outputs)
        self.layer = merged_layer(layer, self.inputs, self.outputs)
        self.prior = prior_of(layer, self.parents, self.inputs, self.outputs)

    def merged(self, values: list[Tensor], layout: Layout) -> Tensor:
        """Unit by unit: the mean over the owners of (n, taps, units), flattened."""
        units = []
        for j, mask in enumerate(layout.masks.tolist()):
            held = [p for p in range(len(values)) if mask >> p & 1]
            units.append(sum(values[p][..., layout.sources[p, j]] for p in held) / len(held))
        return torch.stack(units, -1).flatten(1)

    @property
    def z(self) -> Tensor:
        return self.merged(self.rows, self.inputs)

    @property
    def t(self) -> Tensor:
        outs = [x.flatten(1) @ w.T + bias for x, (w, bias) in zip(self.rows, self.parents, strict=True)]
        return self.merged([out[:, None] for out in outs], self.outputs)

    @property
    def allowed(self) -> Tensor:
        """(o, d) True where the row and the column have an owner in common."""
        mask = (self.outputs.masks[:, None] & self.inputs.masks[None, :]) > 0
        return mask[:, None].expand(-1, self.taps, -1).flatten(1)

    def solve(self, ridge: float = 1e-2, kind: type[Equations] | type[KeptRows] = Equations) -> LayerSolution:
        sums = kind(self.layer, self.prior)
        for z, t in zip(self.z[None].split(64, 1), self.t[None].split(64, 1), strict=True):
            sums.add(z, t)
        return sums.solve(self.blocks, ridge, 0.25)


@pytest.mark.parametrize(("parents", "inputs", "outputs"), PLANS)
def test_a_row_reads_what_it_shares_an_owner_with(
    parents: int, inputs: list[list[int]], outputs: list[list[int]]
) -> None:
    s = Setting(parents, inputs, outputs)
    found = torch.zeros(s.outputs.size, s.inputs.size, dtype=torch.bool)
    for block in s.blocks:
        found[block.rows[:, None], block.columns] = True
    assert torch.equal(found, s.allowed)
    assert torch.cat([block.rows for block in s.blocks]).sort().values.tolist() == list(range(s.outputs.size))


@pytest.mark.parametrize(("parents", "inputs", "outputs"), PLANS)
def test_the_prior_is_the_owners_mean(
    parents: int, inputs: list[list[int]], outputs: list[list[int]]
) -> None:
    """Of an owner's weights those on inputs that it has a share in."""
    s = Setting(parents, inputs, outputs)
    for i, row in enumerate(s.outputs.masks.tolist()):
        held = [p for p in range(parents) if row >> p & 1]
        bias = sum(float(s.parents[p][1][s.outputs.sources[p, i]]) for p in held) / len(held)
        assert float(s.prior.bias[0, i]) == pytest.approx(bias)
        for j, column in enumerate(s.inputs.masks.tolist()):
            expected = sum(
                float(s.parents[p][0][s.outputs.sources[p, i], s.inputs.sources[p, j]])
                for p in held
                if column >> p & 1
            ) / len(held)
            assert float(s.prior.weight[0, i, j]) == pytest.approx(expected)


@pytest.mark.parametrize(("parents", "inputs", "outputs"), PLANS)
@pytest.mark.parametrize(("bias", "taps"), [(True, 1), (False, 1), (True, 3)])
def test_block_solves_equal_masked_lstsq_on_stacked_rows(
    parents: int, inputs: list[list[int]], outputs: list[list[int]], bias: bool, taps: int
) -> None:
    """Ridge solves from one Gram matrix, streamed in batches, are the masked dense problem."""
    s = Setting(parents, inputs, outputs, bias=bias, taps=taps)
    solution = s.solve()
    z, t = s.z, s.t
    # Where the layer has no bias it is fitted about the origin.
    gram = (z - z.mean(0) * bias).square().mean(0)
    for block in s.blocks:
        columns = (torch.arange(taps)[:, None] * s.inputs.size + block.columns).flatten()
        damping = 1e-2 * float(gram[columns].mean())
        dense = ridge_by_lstsq(z, t, s.prior.weight[0], damping, intercept=bias, allowed=s.allowed)
        torch.testing.assert_close(solution.weight[block.rows], dense[block.rows], **F64)
    assert bool((solution.weight[~s.allowed] == 0).all())
    expected = t.mean(0) - solution.weight @ z.mean(0) if bias else torch.zeros(s.outputs.size).double()
    torch.testing.assert_close(solution.bias, expected, **F64)


@pytest.mark.parametrize(("parents", "inputs", "outputs"), PLANS)
@pytest.mark.parametrize("bias", [True, False])
def test_evidence_is_what_rows_through_the_layer_measure(
    parents: int, inputs: list[list[int]], outputs: list[list[int]], bias: bool
) -> None:
    """Residual, mean and variance from the sums are those of the rows."""
    s = Setting(parents, inputs, outputs, bias=bias)
    solution = s.solve(1e-3)
    out = s.z @ solution.weight.T + solution.bias
    torch.testing.assert_close(solution.residual, (out - s.t).square().mean(0), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solution.target, s.t.var(0, unbiased=False), **F64)
    torch.testing.assert_close(solution.mean, out.mean(0), **F64)
    torch.testing.assert_close(solution.variance, out.var(0, unbiased=False), **F64)
    assert solution.rows == 300
    assert solution.relative_residual == pytest.approx(float(solution.residual.sum() / solution.target.sum()))


def test_fully_apart_gives_the_parents_own_weights() -> None:
    for parents in (2, 3):
        alone = [1 << p for p in range(parents)]
        s = Setting(parents, [alone] * IN, [alone] * OUT)
        solution = s.solve(1e-3)
        torch.testing.assert_close(solution.weight, torch.block_diag(*(w for w, _ in s.parents)), **F64)
        torch.testing.assert_close(solution.bias, torch.cat([b for _, b in s.parents]), **F64)
        assert solution.relative_residual < 1e-12


@pytest.mark.parametrize(("parents", "inputs", "outputs"), PLANS)
def test_identical_parents_come_back_at_every_width(
    parents: int, inputs: list[list[int]], outputs: list[list[int]]
) -> None:
    """Also where the rows alone would not say so: the prior does, and nothing is left to fit."""
    s = Setting(parents, inputs, outputs, rows=3)
    s.rows, s.parents = s.rows[:1] * parents, s.parents[:1] * parents
    layer = Layer("fc", ("fc",), "fc.weight", "fc.bias", 1, IN, OUT)
    s.prior = prior_of(layer, s.parents, s.inputs, s.outputs)
    solution = s.solve()
    torch.testing.assert_close(s.z @ solution.weight.T + solution.bias, s.t, **F64)
    torch.testing.assert_close(solution.weight, s.prior.weight[0], **F64)


@pytest.mark.parametrize("condition", [1e1, 1e4])
def test_ridge_solve_equals_lstsq_at_a_chosen_condition_number(condition: float) -> None:
    torch.manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(200, 8).double())
    v, _ = torch.linalg.qr(torch.randn(8, 8).double())
    spectrum = torch.logspace(0, -float(torch.tensor(condition).log10()), 8).double()
    z = q @ torch.diag(spectrum) @ v.T * 200**0.5
    t, prior = torch.randn(200, 3).double(), torch.randn(3, 8).double()
    gram, cross = z.T @ z / 200, t.T @ z / 200
    solved = ridge_solve(gram, cross, prior, 1e-3)
    dense = ridge_by_lstsq(z, t, prior, 1e-3 * float(gram.diagonal().mean()), intercept=False)
    torch.testing.assert_close(solved, dense, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("parents", [2, 3])
def test_grouped_solve_equals_one_solve_per_group(parents: int) -> None:
    torch.manual_seed(2)
    groups, per_in, per_out, taps, n = 4, 2, 3, 4, 200
    geometry = ((2, 2), (1, 1), (0, 0), (1, 1))
    layer = Layer(
        "g", ("g",), "g.weight", "g.bias", taps, groups * per_in, groups * per_out, groups, *geometry
    )
    alone = [1 << p for p in range(parents)]
    plan = {0: ClassPlan.of([[everyone(parents)], alone, [everyone(parents)], [3, *alone[2:]]], parents)}
    inputs = lay_out(DimUnits(torch.zeros(8).long(), torch.arange(8) // per_in), plan, parents)
    outputs = lay_out(DimUnits(torch.zeros(12).long(), torch.arange(12) // per_out), plan, parents)
    own = [
        (torch.randn(groups * per_out, layer.d_in).double(), torch.randn(groups * per_out).double())
        for _ in range(parents)
    ]
    merged = merged_layer(layer, inputs, outputs)
    assert merged.groups == plan[0].width
    assert merged.d_in == layer.d_in
    z = torch.randn(merged.groups, n, layer.d_in).double()
    t = torch.randn(merged.groups, n, per_out).double()
    sums = Equations(merged, prior_of(layer, own, inputs, outputs))
    sums.add(z[:, :90], t[:, :90])
    sums.add(z[:, 90:], t[:, 90:])
    solution = sums.solve(blocks_of(layer, inputs, outputs), 1e-2, 0.25)
    for place, mask in enumerate(plan[0].masks.tolist()):
        held = [p for p in range(parents) if mask >> p & 1]
        units = [int(plan[0].sources[p, place]) for p in held]
        rows = [own[p][0][u * per_out : (u + 1) * per_out] for p, u in zip(held, units, strict=True)]
        prior = sum(rows[1:], rows[0]) / len(held)
        damping = 1e-2 * float((z[place] - z[place].mean(0)).square().mean())
        dense = ridge_by_lstsq(z[place], t[place], prior, damping, intercept=True)
        torch.testing.assert_close(solution.weight[place * per_out : (place + 1) * per_out], dense, **F64)


def test_float32_rows_far_from_the_origin_are_solved_about_their_mean() -> None:
    """Why there is a shift: without it a mean of 1,000 leaves no digits for a variance of 1."""
    torch.manual_seed(3)
    layer = Layer("fc", ("fc",), "fc.weight", "fc.bias", 1, 6, 2)
    z, wanted = torch.randn(2000, 6) + 1000, torch.randn(2, 6)
    t = z @ wanted.T
    sums = Equations(layer, Prior(torch.zeros(1, 2, 6).double(), torch.zeros(1, 2).double()))
    for rows, targets in zip(z.split(256), t.split(256), strict=True):
        sums.add(rows[None], targets[None])
    solution = sums.solve((Block(torch.arange(2), torch.arange(6)),), 1e-7, 0.25)
    torch.testing.assert_close(solution.weight.float(), wanted, rtol=1e-3, atol=1e-3)


def test_too_few_rows_names_layer_rank_and_remedy() -> None:
    s = Setting(*PLANS[0])
    for kind in (Equations, KeptRows):
        sums = kind(s.layer, s.prior)
        sums.add(s.z[None], s.t[None])
        with pytest.raises(
            TooFewRows,
            match=r"layer 'fc': 300 rows for 5 unknowns per output \(rank at most 300, at least 501 rows.*more proxy",
        ):
            sums.solve(s.blocks, 1e-3, 100)
    with pytest.raises(TooFewRows, match="layer 'fc': 0 rows"):
        KeptRows(s.layer, s.prior).solve(s.blocks, 1e-3, 1)


def test_rows_that_are_not_finite_are_refused_with_the_layers_name() -> None:
    s = Setting(*PLANS[0])
    z = s.z
    z[7, 2] = float("nan")
    sums = Equations(s.layer, s.prior)
    sums.add(z[None], s.t[None])
    with pytest.raises(
        NonFinite, match=r"layer 'fc': its second moments are NaN or infinite\. Look at the proxies"
    ):
        sums.solve(s.blocks, 1e-3, 0.25)


def test_dead_inputs_are_named_and_keep_the_partial_merge_weights() -> None:
    s = Setting(*PLANS[0], taps=2)
    for rows in s.rows:
        rows[:, :, 2] = 0.5
    solution = s.solve()
    assert solution.dead.tolist() == [2]
    torch.testing.assert_close(solution.weight[:, [2, 7]], s.prior.weight[0][:, [2, 7]], **F64)
    assert dead_positions(torch.tensor([1.0, 1e-14, 0.0])).tolist() == [1, 2]


@pytest.mark.parametrize(("parents", "inputs", "outputs"), PLANS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_dual_form_over_rows_is_the_same_minimum(
    parents: int, inputs: list[list[int]], outputs: list[list[int]], bias: bool
) -> None:
    s = Setting(parents, inputs, outputs, bias=bias)
    primal, dual = s.solve(), s.solve(kind=KeptRows)
    for name in ("weight", "bias", "mean", "variance", "residual", "target"):
        torch.testing.assert_close(getattr(dual, name), getattr(primal, name), rtol=1e-4, atol=1e-4)


def test_rows_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Setting(*PLANS[0])
    monkeypatch.setattr(pleas.solve.equations, "MAX_ROWS", 100)
    solution = s.solve(kind=KeptRows)
    assert solution.rows == 100
    z, t = s.z[:100], s.t[:100]
    damping = 1e-2 * float((z - z.mean(0)).square().mean())
    dense = ridge_by_lstsq(z, t, s.prior.weight[0], damping, intercept=True)
    torch.testing.assert_close(solution.weight, dense, rtol=1e-4, atol=1e-4)


def test_the_form_follows_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Layer("fc", ("fc",), "fc.weight", "fc.bias", 1, 6001, 2)
    conv = Layer("c", ("c",), "c.weight", None, 9, 1000, 2, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    assert is_wide(wide)
    assert not is_wide(conv)
    prior = Setting(*PLANS[0]).prior
    assert isinstance(equations_of(wide, prior), KeptRows)
    assert isinstance(equations_of(conv, prior), Equations)
    s = Setting(*PLANS[1])
    exact = s.solve().weight
    monkeypatch.setattr(pleas.solve.equations, "LARGE", 3)  # sums of very large layers are kept in float32
    torch.testing.assert_close(s.solve().weight, exact, rtol=1e-3, atol=1e-4)


def test_a_layer_before_a_batch_norm_has_an_intercept() -> None:
    norm = BatchNorm("bn", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", 1e-5)
    layer = Layer("c", ("c",), "c.weight", None, 1, 3, 2, norm=norm)
    assert pleas.layers.layer.has_intercept(layer)
    assert not pleas.layers.layer.has_intercept(Layer("c", ("c",), "c.weight", None, 1, 3, 2))


def test_damped_solve_of_a_definite_matrix_is_the_inverse() -> None:
    torch.manual_seed(4)
    root = torch.randn(3, 6, 6).double()
    matrix, right, damping = (
        root @ root.mT,
        torch.randn(3, 6, 2).double(),
        torch.tensor([0.1, 1.0, 3.0]).double(),
    )
    expected = torch.linalg.solve(matrix + damping[:, None, None] * torch.eye(6).double(), right)
    torch.testing.assert_close(damped_solve(matrix, damping, right, "fc"), expected, **F64)


def test_damped_solve_counts_eigenvalues_below_zero_as_zero() -> None:
    """Rounding leaves them: a Cholesky factor does not exist, and the solution stays bounded all the same."""
    torch.manual_seed(5)
    q, _ = torch.linalg.qr(torch.randn(5, 5).double())
    values = torch.tensor([4.0, 2.0, 1.0, 0.0, -0.01]).double()
    matrix, right = q @ torch.diag(values) @ q.T, torch.randn(5, 2).double()
    damping = torch.tensor(1e-3, dtype=torch.float64)
    expected = q @ torch.diag(1 / (values.clamp_min(0) + 1e-3)) @ q.T @ right
    torch.testing.assert_close(damped_solve(matrix, damping, right, "fc"), expected, **F64)
    with pytest.raises(NonFinite, match="layer 'fc'"):
        damped_solve(matrix * float("inf"), damping, right, "fc")


def test_rows_count_by_their_shares() -> None:
    """Shares of whole numbers are as if rows came that often."""
    s = Setting(*PLANS[1])
    z, t, often = s.z[None], s.t[None], torch.arange(300) % 4
    weighted, repeated = Equations(s.layer, s.prior), Equations(s.layer, s.prior)
    weighted.add(z, t, often.double())
    repeated.add(z.repeat_interleave(often, 1), t.repeat_interleave(often, 1))
    one, other = (sums.solve(s.blocks, 1e-2, 0.25) for sums in (weighted, repeated))
    for name in ("weight", "bias", "mean", "variance", "residual", "target"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **F64)
