"""Matching: assignments are the best there are, and of many parents consistent around every cycle."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import MergeSettings, Parents, Permutation
from pleas.matching.activations import activation_similarities
from pleas.matching.assign import best_assignment, similarity_of_pairs
from pleas.matching.weights import match_weights
from pleas.symmetry import compose, identity, inverse, permute_state, random, state_of
from tests.merging import SETTINGS, evidence_of, images, parents, permuted_copy, relatives, traced
from tests.reference import assignment_by_enumeration

WEIGHT = replace(SETTINGS, matching="weight")


def same(first: Permutation, second: Permutation) -> bool:
    return all(
        torch.equal(x.perm, y.perm) and all(same(a, b) for a, b in zip(x.children, y.children, strict=True))
        for x, y in zip(first, second, strict=True)
    )


def test_assignment_is_the_best_of_all_permutations() -> None:
    torch.manual_seed(3)
    for _ in range(10):
        similarity = torch.randn(6, 6).double()
        perm = best_assignment(similarity)
        assert float(similarity[torch.arange(6), perm].sum()) == pytest.approx(
            assignment_by_enumeration(similarity)
        )


@pytest.mark.parametrize("name", ["residual", "grouped", "concatenating", "shared_conv"])
@pytest.mark.parametrize("settings", [SETTINGS, WEIGHT], ids=["activation", "weight"])
def test_copies_come_back(name: str, settings: MergeSettings) -> None:
    """Every parent's tensors in the common order are the first one's."""
    modules = (parents(name)[0], permuted_copy(name, 3), permuted_copy(name, 4))
    evidence = evidence_of(name, modules, settings)
    assert same(evidence.alignments[0], identity(evidence.parents.symmetry))
    for state in evidence.states[1:]:
        for key, value in state.items():
            assert torch.equal(value, evidence.states[0][key]), key


@pytest.mark.parametrize("settings", [SETTINGS, WEIGHT], ids=["activation", "weight"])
def test_the_order_of_parents_does_not_matter(settings: MergeSettings) -> None:
    """Units that play one part do so whoever comes first: alignments differ by the first parent's own order alone."""
    modules = relatives("residual", 4, 0.6)
    there = evidence_of("residual", modules, settings).alignments
    for order in ((3, 2, 1, 0), (1, 3, 0, 2)):
        moved = evidence_of("residual", tuple(modules[p] for p in order), settings).alignments
        back = inverse(there[order[0]])
        for place, p in enumerate(order):
            assert same(moved[place], compose(back, there[p]))


def test_three_parents_agree_around_every_cycle_and_better_than_one_against_the_others() -> None:
    """From parent to parent to parent and back is where one started; and the total over all pairs of parents is no less
    than that of matching everybody to any one parent."""
    evidence = evidence_of("residual", parents("residual", 3))
    alignments, symmetry = evidence.alignments, evidence.parents.symmetry

    def between(p: int, q: int) -> Permutation:
        return compose(inverse(alignments[p]), alignments[q])

    assert same(compose(compose(between(0, 1), between(1, 2)), between(2, 0)), identity(symmetry))

    def total(chosen: tuple[Permutation, ...]) -> float:
        found = 0.0
        for p, q in itertools.combinations(range(3), 2):
            blocks = activation_similarities(evidence.statistics, 3, p, q)
            direct = compose(inverse(chosen[p]), chosen[q])
            for c, unit_class in enumerate(symmetry.classes):
                if c not in symmetry.output:
                    found += float(similarity_of_pairs(unit_class, unit_class, direct[c], blocks).sum())
        return found

    pair = {
        (p, q): evidence_of("residual", (parents("residual", 3)[p], parents("residual", 3)[q])).alignments[1]
        for p, q in itertools.permutations(range(3), 2)
    }
    for hub in range(3):
        star = tuple(identity(symmetry) if q == hub else pair[hub, q] for q in range(3))
        assert total(alignments) >= total(star) - 1e-6


def test_similarities_are_correlations_of_units() -> None:
    """Against numpy's way of computing them, from activations of the modules themselves."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(3)]
    x = torch.randn(400, 6)
    made = Parents.of(nets, x[:2])
    statistics = pleas.collect(made, list(x.split(100)))
    with torch.no_grad():
        reads = [net[:2](x).double() for net in nets]
    for p, q in itertools.permutations(range(3), 2):
        found = activation_similarities(statistics, 3, p, q)["2.weight", 1]
        expected = torch.corrcoef(torch.cat([reads[p], reads[q]], 1).T)[:5, 5:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_constant_units_correlate_with_nothing() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    with torch.no_grad():
        nets[0][0].bias[2] = -1e3  # type: ignore[index]
    x = torch.randn(100, 6)
    statistics = pleas.collect(Parents.of(nets, x[:2]), [x])
    found = activation_similarities(statistics, 2)["2.weight", 1]
    assert bool((found[2] == 0).all())
    assert bool(found.isfinite().all())


def test_output_units_are_never_moved() -> None:
    for settings in (SETTINGS, WEIGHT):
        evidence = evidence_of("residual", parents("residual", 3), settings)
        for alignment in evidence.alignments:
            for c in evidence.parents.symmetry.output:
                assert torch.equal(alignment[c].perm, torch.arange(len(alignment[c].perm)))


def test_weight_matching_reads_no_images() -> None:
    made = Parents.of([parents("residual")[0], permuted_copy("residual")], images("residual", 2), WEIGHT)
    chosen = pleas.match(made, None)
    aligned = permute_state(made.symmetry, made.states[1], chosen[1])
    assert all(torch.equal(aligned[key], value) for key, value in made.states[0].items())


def test_weight_matching_is_no_worse_than_where_it_starts() -> None:
    symmetry = traced("residual")
    a, b = (state_of(symmetry.program, m) for m in parents("residual"))
    learnt = symmetry.program.parameters

    def total(other: dict[str, Tensor]) -> float:
        return sum(float((a[name].double() * other[name].double()).sum()) for name in learnt)

    chosen, value = match_weights(symmetry, a, b)
    assert value == pytest.approx(total(permute_state(symmetry, b, chosen)))
    generator = torch.Generator().manual_seed(0)
    for tried in [identity(symmetry), *(random(symmetry, generator) for _ in range(20))]:
        assert value >= total(permute_state(symmetry, b, tried))


def test_heads_of_other_label_sets_do_not_take_part() -> None:
    a, b = (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, size)) for size in (3, 4))
    b[0].load_state_dict(a[0].state_dict())
    made = Parents.of([a, b], torch.zeros(2, 6), replace(WEIGHT, heads="separate"))
    assert all(torch.equal(x.perm, torch.arange(len(x.perm))) for x in pleas.match(made, None)[1])


def mlp(seed: int, base: nn.Module | None = None, distance: float = 1.0) -> nn.Sequential:
    """6 -> 5 -> 3, random or some way from a base."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        for tensor, origin in zip(
            made.parameters(), base.parameters() if base is not None else (), strict=False
        ):
            tensor.data = origin.data + distance * tensor.data
    return made


def exchanged(net: nn.Sequential) -> nn.Sequential:
    """The same function with hidden units 1 and 3 exchanged."""
    made, order = copy.deepcopy(net), [0, 3, 2, 1, 4]
    made[0].weight.data, made[0].bias.data = net[0].weight[order].data, net[0].bias[order].data  # type: ignore
    made[2].weight.data = net[2].weight[:, order].data  # type: ignore[index]
    return made


@pytest.mark.parametrize("distance", [0.7, 1.5, 3.0])
def test_units_of_siblings_move_only_where_that_beats_chance(distance: float) -> None:
    """Of all permutations the one of most similarity less two standard errors for every correlation of a unit that
    moves."""
    base = mlp(0)
    siblings, x = [mlp(1, base, distance), mlp(2, base, distance)], torch.randn(36, 6)
    evidence = pleas.gather(Parents.of(siblings, x[:2], base=base), [x])
    blocks = activation_similarities(evidence.statistics, 2)
    similarity = blocks["0.weight", 0] + blocks["2.weight", 1]
    places = torch.arange(5)

    def worth(order: tuple[int, ...]) -> float:
        there = torch.tensor(order)
        return float(similarity[places, there].sum()) - 2 * 2 / math.sqrt(36) * int((there != places).sum())

    best = max(itertools.permutations(range(5)), key=worth)
    hidden = next(c for c, part in enumerate(evidence.alignments[1]) if len(part.perm) == 5)
    assert evidence.alignments[1][hidden].perm.tolist() == list(best)


@pytest.mark.parametrize("settings", [SETTINGS, WEIGHT], ids=["activation", "weight"])
def test_siblings_stay_in_place_and_a_real_permutation_is_found_and_counted(settings: MergeSettings) -> None:
    base, x = mlp(0), torch.randn(64, 6)
    near, other = mlp(1, base, 0.05), mlp(2, base, 0.05)
    still = pleas.gather(Parents.of([near, other], x[:2], settings, base=base), [x])
    assert all(same(alignment, identity(still.parents.symmetry)) for alignment in still.alignments)
    assert still.notes == ("a common base: all 5 units are best where they are, and none was permuted",)
    moved = pleas.gather(Parents.of([near, other, exchanged(other)], x[:2], settings, base=base), [x])
    assert same(moved.alignments[1], identity(moved.parents.symmetry))
    torch.testing.assert_close(moved.states[2], moved.states[1], rtol=0, atol=0)
    assert moved.notes[0].startswith(
        "a common base: 8 of 10 units stay where they are, a permutation helps for 2 in 1 classes ("
    )
    assert moved.notes[0].endswith(" of c: 2 of 5)")


def test_without_a_base_nothing_is_said_of_one() -> None:
    evidence = evidence_of("residual", parents("residual"))
    assert evidence.parents.base is None
    assert evidence.parents.base_state is None
    assert evidence.notes == ()


def test_a_merge_of_siblings_says_how_often_a_permutation_helps() -> None:
    base, x = mlp(0), torch.randn(64, 6)
    result = pleas.merge(mlp(1, base, 0.05), mlp(2, base, 0.05), [x], budget=1.0, base=base)
    assert any(note.startswith("a common base: all 5 units are best where they are") for note in result.notes)
