"""`datafree diagnose` and `datafree proxy` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from datafree.cli import main
from tests.datafree.tiny import Tiny, make_tiny

MIXTURE = "proxy.sources=[{kind: noise, share: 0.5}, {kind: inversion, steps: 2, share: 0.5}]"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def told(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def test_diagnose_tells_of_each_source_and_of_all_together(tiny: Tiny) -> None:
    text = told(invoke("diagnose", tiny.recipe, "--set", MIXTURE))
    assert "BN log-var" in text
    assert "should merge best first" in text
    assert "noise excites few directions" in text
    facts = json.loads(told(invoke("diagnose", tiny.recipe, "--set", MIXTURE, "--json")))
    assert [one["source"] for one in facts["sources"]] == ["1 noise", "2 inversion", "all"]
    assert {place["name"] for place in facts["ranking"]} == {"1 noise", "2 inversion", "all"}
    assert facts["real"] is None
    assert {layer["layer"] for layer in facts["sources"][0]["parents"]["a"]["norms"]} >= {"bn", "block.bn1"}


def test_one_source_is_judged_by_itself(tiny: Tiny) -> None:
    assert "1 noise looks " in told(invoke("diagnose", tiny.recipe))


def test_diagnose_against_the_recipes_oracle(tiny: Tiny) -> None:
    oracle = ("--set", "oracle.count=64", "--set", "oracle.images.digits={split: train}")
    assert "Gram cosine" in told(invoke("diagnose", tiny.recipe, "--real", "oracle", *oracle))
    facts = json.loads(
        told(invoke("diagnose", tiny.recipe, "--real", "oracle", "--real-count", "20", "--json", *oracle))
    )
    assert facts["real"] == 20
    assert {layer["layer"] for layer in facts["sources"][0]["real"]} >= {"stem", "head"}


def test_diagnose_against_files(tiny: Tiny, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", mine=pixels)
    told(invoke("diagnose", tiny.recipe, "--real", f"{tmp_path}/real.npz:mine"))
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.png")
    facts = json.loads(told(invoke("diagnose", tiny.recipe, "--real", tmp_path / "folder", "--json")))
    assert facts["real"] == 40


def test_diagnose_without_what_it_was_told_to_compare_with(tiny: Tiny, tmp_path: Path) -> None:
    none = invoke("diagnose", tiny.recipe, "--real", "oracle")
    assert none.exit_code == 2
    assert "--real oracle: the recipe has no oracle section: add one, or name a folder" in none.stderr
    absent = invoke("diagnose", tiny.recipe, "--real", tmp_path / "absent")
    assert absent.exit_code == 2
    assert absent.stderr.endswith(f"error: image folder {tmp_path}/absent does not exist\n")
    np.savez(tmp_path / "one.npz", x_test=np.zeros((1, 8, 8), dtype=np.uint8))
    one = invoke("diagnose", tiny.recipe, "--real", tmp_path / "one.npz")
    assert "has 1 image; give at least 2, better 64" in one.stderr


def test_evaluation_images_are_no_reference(tiny: Tiny) -> None:
    leak = ("--set", "oracle.count=64", "--set", "oracle.images.digits={split: test}")
    result = invoke("diagnose", tiny.recipe, "--real", "oracle", *leak)
    assert result.exit_code == 2
    assert "evaluation images of task 'upright' are among the oracle's images" in result.stderr


def test_proxy_shows_what_there_is(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = told(invoke("proxy", tiny.recipe, "-o", out, "--png", "--shown", "10", "--set", MIXTURE))
    assert "s/1,000" in text
    assert sorted(path.name for path in out.iterdir()) == [
        "1-noise.png", "2-inversion.png", "all.png", "images", "metrics.json",
    ]  # fmt: skip
    assert Image.open(out / "all.png").size == (
        10 * 10 * 8,
        10 * 8,
    )  # ten images of 8 and a gap of 2, 8 times
    assert len(list((out / "images").rglob("*.png"))) == 64
    facts = json.loads((out / "metrics.json").read_text())
    noise = facts["sources"][0]
    assert noise["count"] == 32
    assert noise["pixels"]["mean"] == pytest.approx([0.5], abs=0.02)
    assert noise["pixels"]["std"] == pytest.approx([0.24], abs=0.02)
    assert sum(noise["parents"]["a"]["predictions"]) == 32


def test_proxy_replaces_only_what_it_wrote(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told(invoke("proxy", tiny.recipe, "-o", out))
    assert invoke("proxy", tiny.recipe, "-o", out).exit_code == 2
    told(invoke("proxy", tiny.recipe, "-o", out, "--overwrite"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    refused = invoke("proxy", tiny.recipe, "-o", tmp_path / "mine", "--overwrite")
    assert refused.exit_code == 2
    assert "holds files that datafree did not write" in refused.stderr
