"""The groups that benchmarks merge: what they hold, and how networks with one head and with several are judged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.mobilenet import mobilenet025
from benchmarks.pairs import PAIRS, Ensemble, Group, Task, accuracy, average, plain_average
from benchmarks.pairs.data import data_folder, mixed
from datafree.errors import UsageError
from datafree.images.image_set import content_hash
from datafree.images.preprocess import Preprocess
from datafree.models.parent import Parent
from datafree.spec import DATA_VARIABLE

PREPROCESS = Preprocess((2, 2), (0.0,), (1.0,))


class Always(nn.Module):
    """A network of one weight per class, which answers the same for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def group_of(labels: Literal["shared", "separate"], *networks: Always) -> Group:
    """Networks of two classes; task number i, of parent i, is three images of classes 0, 1, 1."""

    def loader(network: Always) -> Callable[[str], Parent]:
        return lambda name: Parent(
            name, network.eval(), PREPROCESS, network.logits.numel(), None, "", {}, None, ""
        )

    names = [f"p{number}" for number in range(len(networks))]
    images = np.zeros((3, 1, 2, 2), np.uint8)
    return Group(
        "toy",
        labels,
        {name: loader(network) for name, network in zip(names, networks, strict=True)},
        tuple(lambda name=name: Task(f"of {name}", images, np.array([0, 1, 1]), name) for name in names),
        lambda: images,
        lambda: images,
    )


def test_heads_of_different_sizes_stand_side_by_side_and_have_no_average() -> None:
    group = group_of("separate", Always(3, 0), Always(0, 1, 7))
    assert group.heads == {"p0": slice(0, 2), "p1": slice(2, 5)}
    scores = accuracy(Ensemble(group), group)
    assert scores == pytest.approx({"of p0": 1 / 3, "of p1": 0, "joint": 0})
    assert accuracy(group.modules[1], group)["of p1"] == 0
    message = (
        "group toy: heads of different sizes have no average (p0 2, p1 3): average the parents without them"
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        plain_average(group)


@pytest.fixture
def data(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DATA_VARIABLE, str(shared))
    return shared


def test_shared_labels_are_judged_by_the_mean_of_the_logits() -> None:
    group = group_of("shared", Always(3, 0), Always(0, 1), Always(0, 1))
    scores = accuracy(Ensemble(group), group)
    assert scores == pytest.approx({"of p0": 1 / 3, "of p1": 1 / 3, "of p2": 1 / 3})
    assert average(accuracy(group.modules[1], group)) == pytest.approx(2 / 3)


def test_separate_labels_are_judged_head_by_head_and_jointly() -> None:
    group = group_of("separate", Always(3, 0), Always(0, 1), Always(5, 1))
    scores = accuracy(Ensemble(group), group)  # of all six outputs, class 0 of the last is the largest
    assert scores == pytest.approx({"of p0": 1 / 3, "of p1": 2 / 3, "of p2": 1 / 3, "joint": 1 / 9})
    assert average(scores) == pytest.approx(4 / 9)
    assert group.heads == {"p0": slice(0, 2), "p1": slice(2, 4), "p2": slice(4, 6)}


def test_an_average_of_weights_answers_every_task_by_its_one_head() -> None:
    group = group_of("separate", Always(3, 0), Always(0, 1), Always(0, 5))
    merged = plain_average(group)
    assert merged.logits.tolist() == [1, 2]  # type: ignore[union-attr]
    assert accuracy(merged, group) == pytest.approx(dict.fromkeys(["of p0", "of p1", "of p2"], 2 / 3))
    assert group.modules[0].logits.tolist() == [3, 0]  # type: ignore[union-attr]


def test_an_output_that_is_no_head_is_refused() -> None:
    group = group_of("separate", Always(3, 0), Always(0, 1))
    message = (
        "group toy: the network returns 3 numbers per image and 2 or 4 are needed, one head or those of all "
        "parents side by side"
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        accuracy(Always(0, 1, 2), group)


def test_judging_leaves_the_network_in_training_mode() -> None:
    group = group_of("shared", Always(3, 0), Always(0, 1))
    network = nn.Sequential(Always(3, 0), nn.Dropout()).train()
    network[0].eval()
    accuracy(network, group)
    assert [module.training for module in network.modules()] == [True, False, True]


def test_inputs_are_normalised_batches() -> None:
    group = group_of("shared", Always(3, 0), Always(0, 1))
    batches = group.inputs(np.full((5, 1, 4, 4), 51, np.uint8), 2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 1, 2, 2), (2, 1, 2, 2), (1, 1, 2, 2)]
    assert torch.allclose(torch.cat(batches), torch.tensor(0.2))


def test_domains_are_mixed_in_turn_and_in_equal_numbers() -> None:
    arrays = [np.full((count, 1, 1, 1), value, np.uint8) for value, count in ((1, 3), (2, 5))]
    assert mixed(arrays).ravel().tolist() == [1, 2, 1, 2, 1, 2]


def test_absent_data_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    message = (
        f"no real images at {tmp_path}: set {DATA_VARIABLE} to the folder that holds data/ and checkpoints/"
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        data_folder()


def test_the_mobilenet_has_the_published_size() -> None:
    network = mobilenet025()
    assert sum(parameter.numel() for parameter in network.parameters()) == 472_808
    assert network.eval()(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)


def test_every_group_is_called_by_its_name() -> None:
    assert all(group.name == name for name, group in PAIRS.items())
    assert all(len(group.load_parents) > 1 and group.load_tasks for group in PAIRS.values())


def test_only_siblings_have_a_base() -> None:
    assert [name for name, group in PAIRS.items() if group.load_base is not None] == [
        "pacs_photo_sketch_base"
    ]
    assert PAIRS["resnet20"].base is None


@pytest.mark.slow
def test_the_halves_know_their_own_classes(data: Path) -> None:
    scores = accuracy(Ensemble(PAIRS["halves"]), PAIRS["halves"])
    assert scores == pytest.approx({"classes 0-4": 0.905, "classes 5-9": 0.940, "joint": 0.775}, abs=2e-3)


@pytest.mark.slow
def test_the_mobilenets_are_as_good_as_published(data: Path) -> None:
    group = PAIRS["imagenet_mobilenet"]
    scores = [accuracy(module, group)["imagenet"] for module in (*group.modules, Ensemble(group))]
    assert scores == pytest.approx([0.516, 0.516, 0.536], abs=1e-3)


@pytest.mark.parametrize("name", ["resnet20", "imagenet_mobilenet"])
def test_no_proxy_is_an_image_that_judges(name: str, data: Path) -> None:
    group = PAIRS[name]
    judging = {content_hash(image) for task in group.tasks for image in task.images}
    for images in (group.public_images, group.real_images):
        assert images.dtype == np.uint8
        assert not judging & {content_hash(image) for image in images}
