"""The library: two tiny networks in memory become one, in every way a caller may hand over networks and images."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import datafree
import pleas
from datafree.errors import UsageError
from datafree.library import images as library_images
from pleas.errors import InputError, TooFewRows
from tests.datafree.library.small import PREPROCESS, inputs, pixels, small

Pair = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return small(1), small(2)


@pytest.fixture(scope="module")
def merged(pair: Pair) -> datafree.MergedNetworks:
    return datafree.merge(pair, inputs(96), budgets=[1, 1.5, 2])


def same(one: nn.Module, other: nn.Module) -> bool:
    x = inputs(4, seed=9)
    with torch.no_grad():
        return torch.equal(one(x), other(x))


def test_merge_is_what_pleas_makes_of_the_same_inputs(pair: Pair, merged: datafree.MergedNetworks) -> None:
    settings = pleas.MergeSettings(seed=merged.evidence.parents.settings.seed)
    direct = pleas.merge(pair, list(inputs(96).split(64)), budget=1.5, settings=settings)
    assert same(merged[1.5].module, direct.module)
    assert [result.ratio for result in merged] == sorted(result.ratio for result in merged)
    assert type(merged[1].module) is type(pair[0])


def test_everything_apart_is_the_ensemble(pair: Pair, merged: datafree.MergedNetworks) -> None:
    x = inputs(8, seed=9)
    with torch.no_grad():
        expected = sum(small(seed).eval()(x) for seed in (1, 2)) / 2
        torch.testing.assert_close(merged[2].module(x), expected, rtol=1e-4, atol=1e-5)


def test_networks_and_random_numbers_are_left_as_they_were() -> None:
    a, b = small(1).train(), small(2).train()
    before = {name: value.clone() for name, value in a.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    few = pleas.MergeSettings(min_rows=0.0, propagate=0.0)
    with torch.no_grad():
        datafree.merge([a, b], "inversion", count=16, preprocess=PREPROCESS, settings=few)
        datafree.evaluate([a, b], (inputs(8), torch.zeros(8, dtype=torch.int64)))
        datafree.diagnose([a, b], inputs(16))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in a.modules())
    assert all(p.requires_grad and p.grad is None for p in a.parameters())
    for name, value in a.state_dict().items():
        assert torch.equal(value, before[name])


def ways() -> dict[str, Any]:
    """The same 96 inputs as everything that may hold them."""
    x = inputs(96)
    return {
        "a loader of pairs": DataLoader(TensorDataset(x, torch.zeros(96)), batch_size=40),
        "a list of batches": list(x.split(30)),
        "a list of images": list(x),
        "a generator": (one for one in x.split(10)),
        "mappings": [{"pixel_values": part, "labels": torch.zeros(len(part))} for part in x.split(48)],
        "an array": x.numpy(),
        "float64": x.double(),
    }


@pytest.mark.parametrize("way", ways())
def test_inputs_may_come_in_any_form(way: str) -> None:
    found = library_images.take_images(ways()[way], "proxies")
    assert isinstance(found, datafree.Images)
    assert torch.equal(found.values, inputs(96))


def test_pixels_are_normalised_as_preprocess_says(pair: Pair) -> None:
    shown = pixels(96)
    expected = datafree.merge(pair, inputs(96), apart=0.0)
    pictures = [Image.fromarray(one[0].numpy()) for one in shown]
    by_name = {"a": PREPROCESS, "b": datafree.Preprocess((8, 8), (0.5,), (0.25,))}
    for given, preprocess in ((pictures, PREPROCESS), (shown.numpy(), by_name)):
        found = datafree.merge(pair, given, apart=0.0, preprocess=preprocess)
        assert same(found.module, expected.module)


def test_parents_may_have_names_and_heads_of_their_own(pair: Pair) -> None:
    named: dict[str, nn.Module] = dict(zip(("clinic", "field"), pair, strict=True))
    found = datafree.merge(named, inputs(200), count=96, labels="separate", budget=1.2)
    assert len(found.images) == 96
    assert found.parents.names == ("clinic", "field")
    assert found.module(inputs(3)).shape == (3, 20)
    x, y = inputs(20, seed=4), torch.arange(20) % 10
    scores = datafree.evaluate(found, {"field": (x, y), "other": (x, y)}, experts={"other": "clinic"})
    assert scores["parent clinic"].evaluation.score("field") is None
    assert scores["merged, budget 1.2"].evaluation.joint is not None
    with pytest.raises(UsageError, match=r"task other: .* say `expert: clinic` or another"):
        datafree.evaluate(found, {"other": (x, y)})


def test_siblings_of_a_base_keep_their_units_in_place() -> None:
    base = small(1)
    siblings = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        for seed, sibling in enumerate(siblings):
            for parameter in sibling.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(0.02 * noise)
    found = datafree.merge(siblings, inputs(96), base=base)
    assert found.evidence.parents.base is not None
    for units in found.only.alignments[1]:
        assert units.perm.tolist() == list(range(len(units.perm)))
    with pytest.raises(UsageError, match=r"base is a str: give the torch.nn.Module"):
        datafree.merge(siblings, inputs(96), base="timm:resnet18")  # type: ignore[arg-type]


def test_inverted_images_are_kept_by_the_caller(pair: Pair) -> None:
    images = datafree.invert(pair, 70, preprocess=PREPROCESS, steps=2)
    assert repr(images) == "Images(70 of inversion, 1x8x8, uint8 pixels)"
    assert torch.equal(images.values, datafree.invert(pair, 70, preprocess=PREPROCESS, steps=2).values)
    assert set(images.facts["inversion"]["bn_loss"]) == {"a", "b"}
    assert datafree.merge(pair, images, preprocess=PREPROCESS).images is images
    assert images.plot().axes


def test_refining_takes_pixels_and_normalised_inputs(pair: Pair) -> None:
    for given, preprocess in ((inputs(128), None), (pixels(128), PREPROCESS)):
        merged = datafree.merge(pair, given, budgets=[1, 2], preprocess=preprocess, refine={"steps": 2})
        assert [point.value for point in merged.refined] == [1]  # the ensemble has nothing to learn
        assert merged.rows()[0]["kept"] in ("refined", "start")
        assert any("nothing to refine" in note for note in merged.notes)
    with pytest.raises(
        UsageError, match=r"the merge was made from pixels \(uint8\): give refine the same kind"
    ):
        datafree.refine(merged, inputs(128))
    with pytest.raises(UsageError, match=r"refine takes what datafree.merge gave, not a Linear"):
        datafree.refine(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_eight_bits_are_within_half_a_step_of_the_inputs() -> None:
    images = datafree.Images(inputs(32))
    shown, back = images.in_eight_bits()
    assert back is not None
    span = float(images.values.max() - images.values.min())
    assert float((back(shown) - images.values).abs().max()) <= span / 500


def test_networks_of_ones_own_are_evaluated(pair: Pair) -> None:
    x = inputs(40, seed=3)
    with torch.no_grad():
        y = small(1).eval()(x).argmax(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    scores = datafree.evaluate({"first": pair[0], "second": pair[1]}, loader)
    assert scores["first"].evaluation.average == 1.0
    assert scores["second"].evaluation.average != 1.0
    assert repr(scores) == "Evaluated(2 networks on images: parent first is best, 1.000)"
    alone = datafree.evaluate(pair[0], (pixels(20), np.zeros(20, np.int64)), preprocess=PREPROCESS)
    assert [row["network"] for row in alone.rows()] == ["parent network"]


def test_diagnosing_orders_kinds_of_images(pair: Pair) -> None:
    found = datafree.diagnose(
        pair, {"noise": 2 * torch.randn(64, 1, 8, 8), "flat": torch.full((64, 1, 8, 8), 9.0)}
    )
    assert [place.name for place in found.order] == ["noise", "flat"]
    assert repr(found).startswith("Diagnosed(noise ")
    assert found.plot().axes
    known = datafree.diagnose(pair, "noise", count=16, preprocess=PREPROCESS, real=pixels(32))
    assert known.rows()[0]["matched_as_real"] is not None
    assert known.sources[0].name == "noise"


def test_results_are_one_line_and_become_tables_and_pictures(
    merged: datafree.MergedNetworks, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert repr(merged) == "MergedNetworks(2 parents on 96 images: budget 1, budget 1.5, budget 2)"
    scores = datafree.evaluate(merged, (inputs(20), torch.arange(20) % 10))
    evidence = merged.evidence
    for thing in (merged, merged[1], merged[1].plan, evidence, evidence.parents, merged.images, scores):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 160
    assert merged.plot().axes
    assert scores.plot().axes
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pandas is not installed: pip install pandas, or read rows"):
        merged.to_frame()
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))  # type: ignore[arg-type]
    assert merged.to_frame() == merged.rows()
    assert scores.to_frame()[-1]["network"] == "merged, budget 2"


def test_a_merge_is_saved_and_loaded(merged: datafree.MergedNetworks, tmp_path: Any, pair: Pair) -> None:
    datafree.save(merged[1.5], tmp_path / "out")
    assert same(datafree.load(tmp_path / "out").module, merged[1.5].module)
    with pytest.raises(UsageError, match=r"3 networks were merged .* choose one, merged\[1\]"):
        merged.save(tmp_path / "none")
    folder = datafree.merge(pair, pixels(96), preprocess=PREPROCESS).save(tmp_path / "one")
    assert datafree.load(folder).preprocess.mean == (0.5,)


def test_saving_and_preparing_say_what_they_take(merged: datafree.MergedNetworks, tmp_path: Any) -> None:
    folder = datafree.save(merged[1], tmp_path / "a", preprocess=PREPROCESS)
    artefact = datafree.load(folder)
    assert artefact.preprocess == datafree.Preprocess((8, 8), (0.5,), (0.25,))
    with pytest.raises(UsageError, match=r"images are a Image: a uint8 tensor .*pil_to_tensor\(image\)"):
        artefact.preprocess(Image.new("L", (8, 8)))  # type: ignore[arg-type]
    for wrong, message in (
        ({"size": 8}, "does not say mean and std"),
        ({"sise": 8}, "unknown key; the keys are size"),
    ):
        with pytest.raises(UsageError, match=message):
            datafree.save(merged[1], tmp_path / "b", preprocess=wrong)
    with pytest.raises(UsageError, match=r"save takes one pleas.MergeResult, not a MergedNetworks"):
        datafree.save(merged, tmp_path / "b")  # type: ignore[arg-type]


X = torch.rand(8, 1, 8, 8)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"parents": nn.Linear(1, 1)}, r"parents is one network: give a list of two or more, \[a, b\]"),
    ({"parents": ["timm:resnet18", "b"]}, "parent a is a str: give a torch.nn.Module"),
    (
        {"proxies": "inverison"},
        "proxies='inverison' is no kind of proxies: it is one of diffusion, images, inversion",
    ),
    (
        {"proxies": X[0]},
        r"proxies is one tensor of shape \(1, 8, 8\): images need 4 dimensions, as values\[None\]",
    ),
    ({"proxies": X.long()}, "proxies is torch.int64: give uint8 pixels from 0 to 255, or floats"),
    ({"proxies": X / 0}, "proxies holds NaN or infinity: check how the images are normalised"),
    ({"proxies": []}, "proxies holds no image: give a 4-D tensor"),
    ({"proxies": 3}, "proxies is a int: give a 4-D tensor"),
    ({"proxies": Image.new("L", (8, 8))}, "proxies is one PIL image: give a list of them"),
    ({"proxies": [X, X[..., :4]]}, r"proxies holds images of \(1, 8, 4\) .* give all of them one size"),
    ({"proxies": [(1, X)]}, r"batch 0 of proxies is tuple: give batches x \(N, C, H, W\), or pairs \(x, y\)"),
    ({"proxies": {"count": 3}}, "proxies is a mapping without `kind`"),
    (
        {"proxies": {"kind": "inversion", "step": 3}},
        r"proxies.*\['step'\]: unknown key; did you mean 'steps'",
    ),
    (
        {"proxies": "inversion"},
        r"parent a does not say how pixels become its input \(size, mean, std unknown\)",
    ),
    (
        {"proxies": "noise", "preprocess": {"size": 8, "mean": [0.5] * 2, "std": [1]}},
        r"preprocess: mean has 2",
    ),
    (
        {"preprocess": {"c": {}}},
        "preprocess names 'c': its keys are interpolation, mean, size, std, or the parents'",
    ),
    ({"budget": [1, 1]}, r"budget=\[1, 1\]: give at least one number, each once"),
    ({"budgets": [0.5]}, r"budgets=\[0.5\]: 0.5 is no number from 1 to 2 \(2 is the ensemble\)"),
    ({"budget": "1"}, "budget='1': '1' is no number from 1 to 2"),
    ({"budget": 1, "apart": 0.5}, "budget and apart are given together: give one of them"),
    ({"refine": {"steps": 1, "minutes": 1}}, "refine: give `steps` or `minutes`, not both"),
    ({"refine": {"step": 1}}, r"refine\['step'\]: unknown key; did you mean 'steps'"),
    ({"refine": True}, "refine=True: give steps, or keys as"),
    ({"refine": {"curve": 3}}, "refine: curve belongs to a recipe: use datafree.run"),
    ({"device": "gpu"}, "--device gpu: give auto, cpu, cuda"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_one_sentence(given: dict[str, Any], message: str, pair: Pair) -> None:
    arguments: dict[str, Any] = {"parents": pair, "proxies": X, **given}
    with pytest.raises(UsageError, match=message) as raised:
        datafree.merge(**arguments)
    assert "\n" not in str(raised.value)


def test_mistakes_in_tasks_are_one_sentence(pair: Pair, merged: datafree.MergedNetworks) -> None:
    y = torch.zeros(8, dtype=torch.int64)
    for tasks, message in (
        (X, "task 'images' has no labels: give a pair"),
        ([X], "batch 0 of task 'images' has no labels: give pairs"),
        ((X, y[:3]), r"labels \(3,\) torch.int64 for images \(8, 1, 8, 8\)"),
        ((X, y.float()), "labels are whole numbers from 0 on"),
        ({}, "tasks is empty"),
        ((X, y + 10), "task images: label 10 .* is beyond the head's 10 outputs"),
        ({"one": (X, y), "two": (pixels(8), y)}, "some tasks hold uint8 pixels and others floats"),
        ((pixels(8), y), "the merge was made from normalised inputs: normalise them likewise"),
        ((X[..., :4], y), r"the tasks' images are \(1, 8, 4\) and the networks take \(1, 8, 8\)"),
    ):
        with pytest.raises(UsageError, match=message):
            datafree.evaluate(merged, tasks)
    with pytest.raises(UsageError, match="experts names task 'x': the tasks are images"):
        datafree.evaluate(merged, (X, y), experts={"x": "a"})
    with pytest.raises(UsageError, match=r"labels='separate' needs what datafree.merge gave"):
        datafree.evaluate(pair, (X, y), labels="separate")


def test_too_few_images_are_known_before_any_is_made(pair: Pair) -> None:
    settings = pleas.MergeSettings(positions=1)
    with pytest.raises(TooFewRows, match="rows"):
        datafree.merge(pair, "inversion", count=1, preprocess=PREPROCESS, settings=settings)


def test_pleas_says_what_to_do_with_several_budgets(pair: Pair) -> None:
    with pytest.raises(InputError, match=r"budget = \[1, 1.25\]: one number is needed; .*datafree.merge"):
        pleas.merge(pair, list(inputs(96).split(32)), budget=[1, 1.25])  # type: ignore[arg-type]


def test_a_loader_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_images, "MOST_BYTES", 1000)

    def endless() -> Iterator[Tensor]:
        while True:
            yield inputs(8)

    with pytest.raises(UsageError, match=r"proxies gives more than 0 GiB of images, .* say count=512"):
        datafree.merge([small(1), small(2)], endless())
