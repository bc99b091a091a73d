"""Parents whose outputs are partly the same classes: one head over their union."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas import Evidence, InputError, MergeSettings, Parents
from pleas.heads import plan_of_heads, together
from pleas.network.module import module_from_config, program_config
from pleas.refine import RefineSettings, Teacher, refine
from tests.cases import randomise
from tests.merging import difference, outputs

PLACES = ((0, 1, 2, 3, 4), (3, 5, 4), (5, 0, 6))  # of 5, 3 and 3 outputs in a union of 7


class Net(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.stem, self.norm, self.deep = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10, count)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.deep(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def net(count: int, seed: int) -> nn.Module:
    return randomise(Net(count).eval(), torch.Generator().manual_seed(seed))


def images() -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def settings(heads: str, places: tuple[tuple[int, ...], ...] | None = None) -> MergeSettings:
    return MergeSettings(ridge=1e-6, rows=1000, propagate=0.7, heads=heads, outputs=places)  # type: ignore[arg-type]


@cache
def evidence(count: int, heads: str = "union", places: tuple[tuple[int, ...], ...] | None = None) -> Evidence:
    places = places if heads != "union" or places else PLACES[:count]
    sizes = [5] * count if places is None else [len(own) for own in places]
    parents = [net(size, seed) for seed, size in enumerate(sizes)]
    batches = list(images().split(32))
    return pleas.gather(Parents.of(parents, batches[0][:2], settings(heads, places)), batches)


def test_an_output_is_the_mean_over_those_that_know_it() -> None:
    given = [torch.randn(4, len(own), generator=torch.Generator().manual_seed(len(own))) for own in PLACES]
    found = together(given, "union", PLACES)
    for column in range(7):
        own = [
            x[:, places.index(column)] for x, places in zip(given, PLACES, strict=True) if column in places
        ]
        assert torch.allclose(found[:, column], sum(own) / len(own))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 3])
def test_everything_apart_is_the_ensemble_at_the_parents_cost(count: int) -> None:
    found = evidence(count, places=((0, 1, 2), (2, 3, 1), (4, 0, 3))[:count])
    parents, places = found.parents, found.parents.settings.outputs
    expected = outputs(pleas.Ensemble(*parents.modules, heads="union", outputs=places), images())
    result = pleas.assemble(found, pleas.make_plan(found, budget=float(count)))
    assert result.ratio == count
    assert result.module.head_sizes == (expected.shape[1],)  # type: ignore[union-attr]
    assert difference(outputs(result.module, images()), expected) < 1e-4


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_heads_of_other_sizes_are_fitted_and_come_back(apart: float) -> None:
    found = evidence(3)
    result = pleas.assemble(found, pleas.make_plan(found, apart=apart))
    assert result.held_out_error is not None
    assert 0 < result.held_out_error < 1.5
    config = program_config(result.module)
    assert config is not None
    again = module_from_config(config)
    again.load_state_dict(result.module.state_dict())
    assert torch.equal(outputs(again, images()), outputs(result.module, images()))


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_shared_and_separate_are_its_extremes(apart: float) -> None:
    for heads, places in (
        ("shared", (tuple(range(5)),) * 2),
        ("separate", (tuple(range(5)), tuple(range(5, 10)))),
    ):
        one, other = evidence(2, heads), evidence(2, "union", places)
        ours, theirs = (pleas.assemble(e, pleas.make_plan(e, apart=apart)) for e in (one, other))
        assert torch.equal(outputs(ours.module, images()), outputs(theirs.module, images()))
        assert ours.flops == theirs.flops


def test_halves_of_one_network_merge_back_to_it() -> None:
    """Two copies that each forgot some classes: the union has all of them again."""
    whole = net(5, 0)
    places = ((0, 1, 2), (2, 4, 3))
    parts = []
    for own in places:
        part = net(3, 0)
        part.load_state_dict(
            {k: v[list(own)] if k.startswith("head") else v for k, v in whole.state_dict().items()}
        )
        parts.append(part)
    result = pleas.merge(parts, list(images().split(32)), budget=1.0, settings=settings("union", places))
    assert difference(outputs(result.module, images()), outputs(whole, images())) < 1e-3


def test_refining_learns_the_union() -> None:
    found = evidence(2)
    parents, places = found.parents, found.parents.settings.outputs
    module = pleas.assemble(found, pleas.make_plan(found, budget=1.0)).module
    teachers = [Teacher(name, net) for name, net in zip(parents.names, parents.modules, strict=True)]
    pixels = torch.randint(
        0, 256, (96, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    given = {"normalise": lambda x: x.float() / 128 - 1, "augment": None}
    plan = RefineSettings(steps=4, batch=32, checks=2)
    done = refine(module, teachers, pixels, plan, heads="union", outputs=places, **given)
    assert set(done.start.agreement) == {"a", "b"}
    with pytest.raises(InputError, match="needs `outputs`: one tuple of merged outputs for every teacher"):
        refine(module, teachers, pixels, plan, heads="union", **given)


def test_where_all_know_all_nothing_is_planned() -> None:
    assert plan_of_heads("union", (3, 3), ((0, 1, 2), (0, 1, 2))) is None
    turned = plan_of_heads("union", (3, 3), ((0, 1, 2), (1, 0, 2)))
    assert turned is not None
    assert turned.sources.tolist() == [[0, 1, 2], [1, 0, 2]]


@pytest.mark.parametrize(
    ("heads", "places", "message"),
    [
        ("separate", ((0, 1),), r"heads = 'separate': say heads='union', or leave outputs out"),
        ("union", ((0, 1), (1, 1)), r"outputs\[1\] names the merged output 1 twice"),
        (
            "union",
            ((0, 1), (1, 3)),
            r"name 3 merged outputs, 0 to 3: number them from 0 on and leave none out",
        ),
    ],
)
def test_outputs_that_are_no_union_are_refused(heads: str, places: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(heads, places)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (None, r"needs `outputs`, per parent .*: none given for 2 parents"),
        (((0, 1, 2, 3, 4),), r"1 given for 2 parents"),
        (
            ((0, 1, 2, 3, 4), (4, 3)),
            r"outputs has 2 entries for parent b, which has 5 outputs: give one each",
        ),
    ],
)
def test_outputs_that_do_not_fit_the_parents_are_refused(places: tuple | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Parents.of([net(5, 0), net(5, 1)], images()[:2], settings("union", places))
