"""Every kind of wrong proxy input, as a user meets it: exit code 2, one message with place and remedy, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from datafree.cache.store import CACHE_VARIABLE
from datafree.cli import main
from tests.datafree.tiny import Tiny, make_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return make_tiny(tmp_path / "tiny")


def invoke(command: str, tiny: Tiny, *settings: str, out: Path | None = None) -> Result:
    options = [part for setting in settings for part in ("--set", setting)]
    where = [] if out is None else ["-o", str(out)]
    return CliRunner().invoke(main, [command, str(tiny.recipe), *where, *options])


def refusal(tiny: Tiny, *settings: str) -> str:
    """The message of `check`, on one line."""
    result = invoke("check", tiny, *settings)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").strip()


def from_folder(place: str) -> str:
    return f"proxy.sources=[{{kind: images, images: {{folder: {place}}}}}]"


def pipeline(place: str) -> str:
    return f"proxy.sources=[{{kind: diffusion, pipeline: {place}}}]"


def test_folders_without_images(tiny: Tiny) -> None:
    assert refusal(tiny, from_folder("nowhere")).endswith(
        f"image folder {tiny.folder}/nowhere does not exist"
    )
    (tiny.folder / "empty").mkdir()
    assert f"image folder {tiny.folder}/empty holds no image (.jpg, .jpeg, .png" in refusal(
        tiny, from_folder("empty")
    )
    (tiny.folder / "texts").mkdir()
    (tiny.folder / "texts" / "diary.txt").write_text("dear diary")
    assert f"image folder {tiny.folder}/texts holds no image (.jpg" in refusal(tiny, from_folder("texts"))
    (tiny.folder / "renamed").mkdir()
    (tiny.folder / "renamed" / "diary.jpg").write_text("dear diary")
    assert (
        f"1 of 1 image files in {tiny.folder}/renamed cannot be read, more than 10%: diary.jpg: not an image. "
        "Fetch them again or remove them"
    ) in refusal(tiny, from_folder("renamed"))


def test_too_few_images(tiny: Tiny) -> None:
    (tiny.folder / "few").mkdir()
    for number in range(3):
        Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(tiny.folder / "few" / f"{number}.png")
    assert "proxy source 1 (images) has 3 images, but 64 are asked of it" in refusal(tiny, from_folder("few"))


@pytest.mark.parametrize("harm", ["pickled", "code", "unknown"])
def test_pipelines_that_are_not_loaded(tiny: Tiny, harm: str) -> None:
    folder = tiny.folder / "pipeline"
    (folder / "unet").mkdir(parents=True)
    described = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    if harm == "pickled":
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
        expected = f"diffusion pipeline {folder}: unet has only pickled weights (diffusion_pytorch_model.bin)"
    elif harm == "code":
        (folder / "pipeline.py").write_text("raise SystemExit")
        expected = f"diffusion pipeline {folder} brings code of its own (pipeline.py), which is not run"
    else:
        described = {"_class_name": "NoSuchPipeline"}
        expected = f"diffusion pipeline {folder} asks for the class NoSuchPipeline, which diffusers "
    (folder / "model_index.json").write_text(json.dumps(described))
    assert expected in refusal(tiny, pipeline("pipeline"))


def test_parents_of_different_sizes_and_colours(tiny: Tiny) -> None:
    assert (
        "parents: the parents take different images (a takes 8x8 grey, b takes 16x16 grey): give all of them one "
        "size and one number of channels"
    ) in refusal(tiny, "parents.b.preprocess.size=16")
    text = (tiny.folder / "net.py").read_text()
    (tiny.folder / "colour.py").write_text(text.replace("nn.Conv2d(1, width", "nn.Conv2d(3, width"))
    colour = (
        "parents.b={model: 'python:colour.py:net', random_weights: true, "
        "preprocess: {size: 8, mean: [0.3, 0.3, 0.3], std: [0.4, 0.4, 0.4]}}"
    )
    assert "parents: parents a and b are not one architecture" in refusal(tiny, colour)


def test_batch_norms_that_were_never_trained(tiny: Tiny) -> None:
    fresh = [
        f"parents.{name}={{model: 'python:net.py:net', random_weights: true, "
        "preprocess: {size: 8, mean: [0.3], std: [0.4]}}"
        for name in "ab"
    ]
    assert (
        "cannot be inverted: all its 3 batch-norm layers still have mean 0 and variance 1, so it was never "
        "trained. Use another source"
    ) in refusal(tiny, *fresh, "proxy.sources=[{kind: inversion}]")


def variant(tiny: Tiny, *changes: tuple[str, str]) -> list[str]:
    """Both parents of another class: the tiny network with pieces of its code replaced."""
    text = (tiny.folder / "net.py").read_text()
    for was, now in changes:
        assert was in text
        text = text.replace(was, now)
    (tiny.folder / "variant.py").write_text(text)
    given = "random_weights: true, preprocess: {size: 8, mean: [0.3], std: [0.4]}"
    return [f"parents.{parent}={{model: 'python:variant.py:net', {given}}}" for parent in "ab"]


def test_new_images_for_parents_that_predict_no_classes(tiny: Tiny) -> None:
    unit = variant(
        tiny,
        ("return self.head(", "return nn.functional.normalize(self.head("),
        ("(2, 3)))", "(2, 3))), dim=1)"),
    )
    inverted = "proxy.sources=[{kind: inversion, loss: classes}]"
    assert (
        "refine.fresh: parent a returns vectors of one length (an embedding), which are no logits over classes: "
        "refining fits the outputs themselves by squared error, without softmax and temperature; images in dispute are "
        "found by comparing predictions of classes, so remove refine.fresh"
    ) in refusal(tiny, *unit, inverted, "refine={steps: 2, fresh: {}}")


def test_inner_activations_of_layers_that_are_not_plain(tiny: Tiny) -> None:
    bare = variant(
        tiny,
        ("nn.Linear(width, num_classes)", "nn.Parameter(torch.randn(num_classes, width))"),
        ("self.head(self.block(", "nn.functional.linear((("),
        (".mean((2, 3)))", ").mean((2, 3)), self.head)"),
    )
    assert (
        "refine.feature_weight: features cannot be matched: beyond the first layer none is a plain torch.nn "
        "convolution or linear layer. Leave feature_weight at 0"
    ) in refusal(tiny, *bare, "refine={steps: 2, feature_weight: 0.1}")


def test_a_network_without_batch_norm(tiny: Tiny) -> None:
    text = (tiny.folder / "net.py").read_text().replace("nn.BatchNorm2d(width)", "nn.Identity()")
    (tiny.folder / "plain.py").write_text(text)
    plain = [
        f"parents.{name}={{model: 'python:plain.py:net', random_weights: true, "
        "preprocess: {size: 8, mean: [0.3], std: [0.4]}}"
        for name in "ab"
    ]
    assert (
        "cannot be inverted: it has no batch-norm layer with running statistics. Use another source: public "
        "images (kind: images), diffusion samples (kind: diffusion), or procedural images; or invert its predictions "
        "(loss: classes)"
    ) in refusal(tiny, *plain, "proxy.sources=[{kind: inversion}]")


def test_a_size_the_parent_cannot_take(tiny: Tiny) -> None:
    vit = (
        "{model: 'timm:vit_tiny_patch16_224', random_weights: true, preprocess: "
        "{size: 100, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}"
    )
    message = refusal(tiny, f"parents.a={vit}", f"parents.b={vit}")
    assert (
        "parent a: the model does not accept an image of 3 x 100 x 100 (channels x height x width)" in message
    )
    assert message.endswith("Check preprocess (size, and as many numbers in mean as channels)")


def test_shares_that_do_not_add_up(tiny: Tiny) -> None:
    message = refusal(tiny, "proxy.sources=[{kind: noise, share: 0.5}, {kind: procedural, share: 0.4}]")
    assert "the shares under proxy.sources (0.5, 0.4) add up to 0.9: make them add up to 1" in message


def test_a_cache_that_cannot_be_written(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    result = invoke("proxy", tiny, out=tmp_path / "out")
    assert result.exit_code == 2, result.output
    said = f"the cache folder {tmp_path}/file cannot be written ({tmp_path}/file is not a folder): change its"
    assert f"{said} permissions, or set {CACHE_VARIABLE} to another folder" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_cache_that_is_full(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if len(data) > 1000:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    result = invoke("proxy", tiny, out=tmp_path / "out")
    assert result.exit_code == 1
    assert "could not be written (No space left on device): free space or name another cache folder" in (
        result.stderr
    )
