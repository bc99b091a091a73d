from __future__ import annotations

from typing import Any

import pytest
import torch

from pleas.errors import SingularGram, TooFewRows
from pleas.layers import Layer
from pleas.layout import A_ONLY, B_ONLY, FUSED, ClassPlan, Layout, lay_out
from pleas.matching import best_assignment
from pleas.moments import Moments
from pleas.rows import Rows, solve_rows
from pleas.solve import blocks_of, mixing, pose, ridge_solve, solve, solve_grouped
from pleas.symmetry import DimUnits
from tests.reference import assignment_by_enumeration, ridge_by_lstsq

F64: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def units_of(size: int) -> DimUnits:
    return DimUnits(torch.zeros(size, dtype=torch.int64), torch.arange(size))


def half_apart(size: int, apart: list[int]) -> Layout:
    fused = torch.tensor([u for u in range(size) if u not in apart], dtype=torch.int64)
    return lay_out(units_of(size), {0: ClassPlan(fused, torch.tensor(apart, dtype=torch.int64))})


class Setting:
    """Two parents' layer, their joint input rows, and what merging them for a plan means row by row."""

    def __init__(
        self, apart_in: list[int], apart_out: list[int], *, bias: bool = True, taps: int = 1
    ) -> None:
        torch.manual_seed(0)
        self.c, self.o, self.taps, n = 5, 4, taps, 300
        self.layer = Layer("fc", ("fc",), "fc.weight", "fc.bias" if bias else None, taps, self.c, self.o)
        self.rows_a = torch.randn(n, taps * self.c).double() + 1
        self.rows_b = 0.7 * self.rows_a + torch.randn(n, taps * self.c).double()
        self.a, self.b = (
            (torch.randn(self.o, taps * self.c).double(), torch.randn(self.o).double() * bias) for _ in "ab"
        )
        self.alignment = torch.randperm(self.c)
        own = self.rows_b.view(n, taps, self.c)
        unaligned = torch.empty_like(own)
        unaligned[:, :, self.alignment] = (
            own  # B's own order: aligned position p is its own position alignment[p]
        )
        joint = torch.cat([self.rows_a, unaligned.flatten(1)], 1)
        self.moments = Moments.starting_at(joint[None])
        self.moments.add(joint[None])
        self.inputs, self.outputs = half_apart(self.c, apart_in), half_apart(self.o, apart_out)
        self.problem = pose(
            self.layer, self.moments, self.a, self.b, self.alignment, self.inputs, self.outputs
        )

    def merged(self, rows_a: torch.Tensor, rows_b: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Merged units of rows (n, taps, units), flattened."""
        half = torch.where(layout.kind == FUSED, 0.5, 1.0)
        reads_a, reads_b = layout.kind != B_ONLY, layout.kind != A_ONLY
        return (half * (reads_a * rows_a[..., layout.source] + reads_b * rows_b[..., layout.source])).flatten(
            1
        )

    @property
    def z(self) -> torch.Tensor:
        shape = (-1, self.taps, self.c)
        return self.merged(self.rows_a.view(shape), self.rows_b.view(shape), self.inputs)

    @property
    def t(self) -> torch.Tensor:
        outs = [rows @ w.T + bias for rows, (w, bias) in ((self.rows_a, self.a), (self.rows_b, self.b))]
        return self.merged(outs[0][:, None], outs[1][:, None], self.outputs)

    @property
    def allowed(self) -> torch.Tensor:
        mask = torch.zeros(self.outputs.size, self.taps, self.inputs.size, dtype=torch.bool)
        for block in blocks_of(self.layer, self.inputs, self.outputs):
            mask[block.rows[:, None, None], torch.arange(self.taps)[None, :, None], block.columns] = True
        return mask.flatten(1)


PLANS = [([], []), ([1, 3], [0]), ([0, 1, 2, 3, 4], [0, 1, 2, 3]), ([2], []), ([], [1, 2])]


@pytest.mark.parametrize(("apart_in", "apart_out"), PLANS)
@pytest.mark.parametrize(("bias", "taps"), [(True, 1), (False, 1), (True, 3)])
def test_normal_equations_are_those_of_the_rows(
    apart_in: list[int], apart_out: list[int], bias: bool, taps: int
) -> None:
    s = Setting(apart_in, apart_out, bias=bias, taps=taps)
    z, t = s.z, s.t
    centred, target = z - z.mean(0), t - t.mean(0)
    torch.testing.assert_close(s.problem.gram, centred.T @ centred / len(z), **F64)
    torch.testing.assert_close(s.problem.cross, target.T @ centred / len(z), **F64)
    torch.testing.assert_close(s.problem.target, target.square().mean(0), **F64)
    torch.testing.assert_close(s.problem.mean_in, z.mean(0), **F64)
    torch.testing.assert_close(s.problem.mean_out, t.mean(0), **F64)


@pytest.mark.parametrize(("apart_in", "apart_out"), PLANS)
@pytest.mark.parametrize(("bias", "taps"), [(True, 1), (False, 1), (True, 3)])
def test_block_solves_equal_masked_lstsq_on_stacked_rows(
    apart_in: list[int], apart_out: list[int], bias: bool, taps: int
) -> None:
    """Invariant 4: three ridge solves from one Gram matrix are the masked dense problem."""
    s = Setting(apart_in, apart_out, bias=bias, taps=taps)
    solution = solve(s.layer, s.problem, blocks_of(s.layer, s.inputs, s.outputs), ridge=1e-2, min_rows=0.25)
    z, t, allowed = s.z, s.t, s.allowed
    gram = (z - z.mean(0) * bias).square().mean(0)
    for block in blocks_of(s.layer, s.inputs, s.outputs):
        columns = (torch.arange(taps)[:, None] * s.inputs.size + block.columns).flatten()
        damping = 1e-2 * float(gram[columns].mean())
        dense = ridge_by_lstsq(z, t, s.problem.prior, damping, intercept=bias, allowed=allowed)
        torch.testing.assert_close(solution.weight[block.rows], dense[block.rows], **F64)
    assert bool((solution.weight[~allowed] == 0).all())


@pytest.mark.parametrize(("apart_in", "apart_out"), PLANS)
def test_predicted_residual_is_the_measured_one(apart_in: list[int], apart_out: list[int]) -> None:
    """Invariant 5, and the predicted mean and variance of the outputs with it."""
    s = Setting(apart_in, apart_out)
    solution = solve(s.layer, s.problem, blocks_of(s.layer, s.inputs, s.outputs), 1e-3, 0.25)
    out = s.z @ solution.weight.T + solution.bias
    torch.testing.assert_close(solution.residual, (out - s.t).square().mean(0), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(solution.mean, out.mean(0), **F64)
    torch.testing.assert_close(solution.variance, out.var(0, unbiased=False), **F64)


def test_fully_apart_gives_the_parents_own_weights() -> None:
    s = Setting(list(range(5)), list(range(4)))
    solution = solve(s.layer, s.problem, blocks_of(s.layer, s.inputs, s.outputs), 1e-3, 0.25)
    expected = torch.block_diag(s.a[0], s.b[0])
    torch.testing.assert_close(solution.weight, expected, **F64)
    torch.testing.assert_close(solution.bias, torch.cat([s.a[1], s.b[1]]), **F64)
    assert solution.relative_residual < 1e-12


def test_identical_parents_come_back_at_every_width() -> None:
    for apart_in, apart_out in PLANS:
        s = Setting(apart_in, apart_out)
        prior = s.problem.prior
        twice = pose(s.layer, _twin(s), s.a, s.a, torch.arange(s.c), s.inputs, s.outputs)
        solution = solve(s.layer, twice, blocks_of(s.layer, s.inputs, s.outputs), 1e-3, 0.25)
        z = s.merged(s.rows_a[:, None], s.rows_a[:, None], s.inputs)
        expected = (s.rows_a @ s.a[0].T + s.a[1])[:, s.outputs.source]
        torch.testing.assert_close(z @ solution.weight.T + solution.bias, expected, rtol=1e-7, atol=1e-7)
        assert prior.shape == solution.weight.shape


def _twin(s: Setting) -> Moments:
    joint = torch.cat([s.rows_a, s.rows_a], 1)
    moments = Moments.starting_at(joint[None])
    moments.add(joint[None])
    return moments


@pytest.mark.parametrize("condition", [1e1, 1e4])
def test_ridge_solve_equals_lstsq_at_a_chosen_condition_number(condition: float) -> None:
    torch.manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(200, 8).double())
    v, _ = torch.linalg.qr(torch.randn(8, 8).double())
    z = (
        q
        @ torch.diag(torch.logspace(0, -float(torch.tensor(condition).log10()), 8).double())
        @ v.T
        * 200**0.5
    )
    t, prior = torch.randn(200, 3).double(), torch.randn(3, 8).double()
    gram, cross = z.T @ z / 200, t.T @ z / 200
    solved = ridge_solve(gram, cross, prior, 1e-3)
    dense = ridge_by_lstsq(z, t, prior, 1e-3 * float(gram.diagonal().mean()), intercept=False)
    torch.testing.assert_close(solved, dense, rtol=1e-8, atol=1e-8)


def test_grouped_solve_equals_one_solve_per_group() -> None:
    torch.manual_seed(2)
    groups, per_in, per_out, taps, n = 4, 2, 3, 4, 200
    layer = Layer(
        "g",
        ("g",),
        "g.weight",
        "g.bias",
        taps,
        groups * per_in,
        groups * per_out,
        groups,
        (2, 2),
        (1, 1),
        (0, 0),
        (1, 1),
    )
    d = layer.d_in
    rows_a = torch.randn(groups, n, d).double()
    rows_b = rows_a + torch.randn(groups, n, d).double()
    joint = torch.cat([rows_a, rows_b], -1)
    moments = Moments.starting_at(joint)
    moments.add(joint)
    a, b = ((torch.randn(groups * per_out, d).double(), torch.randn(groups * per_out).double()) for _ in "ab")
    plan = {0: ClassPlan(torch.tensor([0, 2, 3]), torch.tensor([1]))}
    inputs = lay_out(DimUnits(torch.zeros(8).long(), torch.arange(8) // per_in), plan)
    outputs = lay_out(DimUnits(torch.zeros(12).long(), torch.arange(12) // per_out), plan)
    solution = solve_grouped(layer, moments, a, b, inputs, outputs, 1e-2, 0.25)
    merged = [(A_ONLY, 1), (FUSED, 0), (FUSED, 2), (FUSED, 3), (B_ONLY, 1)]
    for place, (kind, group) in enumerate(merged):
        rows = slice(group * per_out, (group + 1) * per_out)
        got = solution.weight[place * per_out : (place + 1) * per_out]
        if kind != FUSED:
            torch.testing.assert_close(got, (a if kind == A_ONLY else b)[0][rows])
            continue
        z = (rows_a[group] + rows_b[group]) / 2
        t = (rows_a[group] @ a[0][rows].T + rows_b[group] @ b[0][rows].T) / 2
        damping = 1e-2 * float((z - z.mean(0)).square().mean())
        torch.testing.assert_close(
            got, ridge_by_lstsq(z, t, (a[0][rows] + b[0][rows]) / 2, damping, intercept=True), **F64
        )


def test_too_few_rows_names_layer_rank_and_remedy() -> None:
    s = Setting([], [])
    with pytest.raises(
        TooFewRows,
        match=r"layer 'fc': 300 rows for 5 unknowns per output \(rank at most 300.*more proxy images",
    ):
        solve(s.layer, s.problem, blocks_of(s.layer, s.inputs, s.outputs), 1e-3, min_rows=100)


def test_a_gram_matrix_that_is_not_positive_definite_is_named() -> None:
    with pytest.raises(SingularGram, match=r"layer 'stem'.*not positive definite.*Raise the ridge"):
        ridge_solve(
            -torch.eye(3).double(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), 1e-3, "stem"
        )


def test_dead_inputs_are_named_and_keep_the_partial_merge_weights() -> None:
    s = Setting([], [])
    s.rows_a[:, 2] = 0
    joint = torch.cat([s.rows_a, torch.zeros_like(s.rows_a)], 1)
    moments = Moments.starting_at(joint[None])
    moments.add(joint[None])
    problem = pose(s.layer, moments, s.a, s.b, torch.arange(s.c), s.inputs, s.outputs)
    solution = solve(s.layer, problem, blocks_of(s.layer, s.inputs, s.outputs), 1e-3, 0.25)
    assert solution.dead.tolist() == [2]
    torch.testing.assert_close(solution.weight[:, 2], (s.a[0] + s.b[0])[:, 2] / 2)


def test_assignment_is_the_best_of_all_permutations() -> None:
    torch.manual_seed(3)
    for _ in range(10):
        similarity = torch.randn(6, 6).double()
        perm = best_assignment(similarity)
        assert float(similarity[torch.arange(6), perm].sum()) == pytest.approx(
            assignment_by_enumeration(similarity)
        )


def test_mixing_of_kinds() -> None:
    a, b = mixing(half_apart(3, [1]))
    assert a.tolist() == [1, 0.5, 0.5, 0]
    assert b.tolist() == [0, 0.5, 0.5, 1]


@pytest.mark.parametrize(("apart_in", "apart_out"), PLANS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_dual_form_over_rows_is_the_same_minimum(
    apart_in: list[int], apart_out: list[int], bias: bool
) -> None:
    s = Setting(apart_in, apart_out, bias=bias)
    blocks = blocks_of(s.layer, s.inputs, s.outputs)
    own = torch.empty_like(s.rows_b)
    own[:, s.alignment] = s.rows_b
    rows = Rows(s.c)
    for part in torch.cat([s.rows_a, own], 1).split(64):
        rows.add(part)
    primal = solve(s.layer, s.problem, blocks, 1e-2, 0.25)
    dual = solve_rows(s.layer, rows, s.a, s.b, s.alignment, s.inputs, s.outputs, blocks, 1e-2, 0.0)
    for name in ("weight", "bias", "residual", "target"):
        torch.testing.assert_close(getattr(dual, name), getattr(primal, name), rtol=1e-4, atol=1e-4)
