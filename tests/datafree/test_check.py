"""What `check` compares between proxies and evaluation images, and what it says when that is a sample."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from datafree.cli import main
from datafree.commands import check
from tests.datafree.tiny import Tiny, make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def checked(tiny: Tiny, *settings: str) -> Result:
    options = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(main, ["check", str(tiny.recipe), *options])


def digits(split: str) -> str:
    return f"proxy.sources=[{{kind: images, images: {{digits: {{split: {split}}}}}}}]"


def pictures(folder: Path, count: int, seed: int) -> str:
    generator = np.random.default_rng(seed)
    for number in range(count):
        place = folder / str(number % 10)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(place / f"{number}.png")
    return str(folder)


def test_small_sets_are_compared_whole(tiny: Tiny) -> None:
    result = checked(tiny, digits("train"))
    assert result.exit_code == 0, result.output
    assert "64 proxy images compared with 40 of upright, 40 of rotated" in result.output
    assert "which is a sample" not in result.output


def test_a_large_source_is_sampled_and_that_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_IMAGES", 64)
    result = checked(tiny, digits("train"), "proxy.count=200")
    assert result.exit_code == 0, result.output
    assert (
        "note: leak: 64 proxy images compared with 40 of upright, 40 of rotated, which is a sample; merge "
        "compares all of them" in result.output
    )


def test_a_sample_finds_a_set_that_was_given_twice(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_IMAGES", 64)
    folder = pictures(tmp_path / "same", 200, 0)
    task = f'evaluate=[{{name: files, images: {{folder: "{folder}"}}}}]'
    leak = checked(
        tiny, f'proxy.sources=[{{kind: images, images: {{folder: "{folder}"}}}}]', "proxy.count=200", task
    )
    assert leak.exit_code == 2
    assert "of the 64 evaluation images of task 'files' are among the proxies" in leak.stderr
    other = pictures(tmp_path / "other", 200, 1)
    sound = checked(
        tiny, f'proxy.sources=[{{kind: images, images: {{folder: "{other}"}}}}]', "proxy.count=200", task
    )
    assert sound.exit_code == 0, sound.output
    assert "64 proxy images compared with 64 of files, which is a sample" in sound.output


def test_the_command_it_ends_with_is_for_what_was_checked(tiny: Tiny) -> None:
    last = checked(tiny, digits("train"), "seed=3").output.splitlines()[-1]
    words = shlex.split(last.split(": ", 1)[1])
    assert words == [
        *("datafree", "merge", str(tiny.recipe), "--set", digits("train"), "--set", "seed=3"),
        *("-o", "OUT"),
    ]


FAULTS = (
    "parents.a.weights=absent.safetensors",
    "parents.b.model='python:net.py:other'",
    "evaluate.0.images={folder: nowhere}",
    "evaluate.1.images={folder: nowhere either}",
)


def test_every_fault_is_said_at_once(tiny: Tiny) -> None:
    result = checked(tiny, *FAULTS)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 4, result.stderr
    for line, part in zip(
        lines, ("parents.a: parent a: ", "parents.b: parent b: ", "evaluate.0: ", "evaluate.1: "), strict=True
    ):
        assert part in line
    assert "weights file" in lines[0]
    assert "nowhere either does not exist" in lines[3]


def test_proxies_and_networks_are_checked_beside_wrong_images(tiny: Tiny) -> None:
    result = checked(
        tiny, FAULTS[2], "proxy.sources=[{kind: images, images: {folder: absent}}]", "merge.min_rows=1e6"
    )
    assert result.exit_code == 2
    said = result.stderr
    assert [part in said for part in ("evaluate.0: ", "proxy: ", "absent does not exist")] == [True] * 3
    assert len(said.splitlines()) == 3, said


def test_what_fits_alone_and_not_together_is_said_once(tiny: Tiny) -> None:
    result = checked(tiny, "parents.b.preprocess.size=16")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "the parents take different images" in result.stderr


def test_json_of_a_check_that_fails_has_its_errors(tiny: Tiny, tmp_path: Path) -> None:
    options = [part for fault in FAULTS for part in ("--set", fault)]
    result = CliRunner().invoke(main, ["check", str(tiny.recipe), *options, "--json"])
    assert result.exit_code == 2
    said = json.loads(result.stdout)
    assert said["ok"] is False
    lines = result.stderr.removeprefix("error: ").splitlines()
    assert [f"{error['place']}: {error['message']}" for error in said["errors"][:2]] == lines[:2]
    assert len(said["errors"]) == len(lines) == 4
    assert [check["part"] for check in said["checks"]] == ["recipe"]
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [\n")
    result = CliRunner().invoke(main, ["check", str(broken), "--json"])
    (error,) = json.loads(result.stdout)["errors"]
    assert error["place"] == f"{broken}:2:1"
    assert error["message"].startswith("expected the node content")
    result = CliRunner().invoke(main, ["check", str(tmp_path / "absent.yaml"), "--json"])
    assert json.loads(result.stdout)["errors"][0]["place"] is None
    result = CliRunner().invoke(main, ["check", str(tiny.recipe), "--json"])
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (0, True)
