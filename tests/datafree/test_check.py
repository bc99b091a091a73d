"""What `check` compares between proxies and evaluation images, and what it says when that is a sample."""

from __future__ import annotations

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
