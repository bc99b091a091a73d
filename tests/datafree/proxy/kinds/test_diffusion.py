from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest
import torch
from safetensors.torch import load_file

from datafree.errors import RunError, UsageError
from datafree.models.parent import Parent
from datafree.proxy import DiffusionSpec, ProxySet, Request
from datafree.proxy.kinds.diffusion import _Diffusion
from tests.datafree.proxy.kinds import tiny_pipelines

Build = Callable[..., ProxySet]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny pipeline of a family, saved once a module."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny_pipelines.build(family, tmp_path_factory.mktemp("pipelines") / family)
        return made[family]

    return folder


@pytest.fixture
def bound(parents: tuple[Parent, Parent], tmp_path: Path) -> Callable[..., _Diffusion]:
    def bind(pipeline: str | Path, **options: Any) -> _Diffusion:
        names: Sequence[tuple[str, ...] | None] = options.pop("classes", (None, None))
        named = [replace(parent, classes=each) for parent, each in zip(parents, names, strict=True)]
        request = Request(named, (16, 16), 3, 0, tmp_path, torch.device("cpu"))
        source = DiffusionSpec(pipeline=str(pipeline), **options).bind(request)
        assert isinstance(source, _Diffusion)
        return source

    return bind


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


FAMILIES = {"unconditional": "unconditional", "class": "class-conditional", "text": "text-to-image"}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_images_whatever_the_batch(
    family: str, folders: Callable[[str], Path], bound: Callable[..., _Diffusion]
) -> None:
    before = torch.get_rng_state()
    shard = bound(folders(family), steps=2, batch=16).shard(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert shard.images.shape == (64, 3, 16, 16)
    assert shard.facts == {"redrawn": 0, "family": FAMILIES[family]}
    assert float(shard.images.float().std()) > 5
    torch.manual_seed(5)
    other = bound(folders(family), steps=2, batch=48).shard(0).images
    assert int((shard.images.int() - other.int()).abs().max()) <= 1  # float rounding
    assert torch.equal(bound(folders(family), steps=2, batch=16).shard(0).images, shard.images)


def test_a_set_of_diffusion_images_is_cached_by_the_pipelines_content(
    build: Build, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    source = {"kind": "diffusion", "pipeline": str(folders("unconditional")), "steps": 1}
    first = build(10, source)
    assert build(10, source | {"batch": 3}).manifest[0].made == 0
    copy = tiny_pipelines.build("unconditional", tmp_path / "copy")
    assert build(10, source | {"pipeline": str(copy)}).batch([3]).equal(first.batch([3]))
    index = copy / "scheduler" / "scheduler_config.json"
    index.write_text(index.read_text().replace("0.02", "0.03"))
    assert build(10, source | {"pipeline": str(copy)}).manifest[0].made == 1


class Sampler:
    """Stands for a loaded pipeline: grey levels count the image's own draws; some behave badly."""

    def __init__(self, room: int = 1000, flagged: Callable[[int], bool] = lambda call: False) -> None:
        self.room, self.flagged = room, flagged
        self.batches: list[int] = []
        self.prompts: list[str] = []
        self.labels: list[int] = []

    def __call__(self, generator: list[torch.Generator], **arguments: Any) -> Any:
        if len(generator) > self.room:
            raise torch.OutOfMemoryError("not enough memory")
        self.batches.append(len(generator))
        self.prompts += arguments.get("prompt", [])
        self.labels += arguments.get("class_labels", [])
        images = torch.stack([torch.rand(3, 16, 16, generator=one) for one in generator])
        flagged = [self.flagged(len(self.batches)) for _ in generator]
        images[torch.tensor(flagged)] = 0
        return SimpleNamespace(images=images, nsfw_content_detected=flagged)


def given(
    source: _Diffusion, sampler: Sampler, family: str = "text-to-image", labels: tuple[int, ...] = ()
) -> Any:
    from datafree.proxy.kinds import diffusion

    source._loaded = diffusion._Loaded(sampler, family, 2, 1.0, labels)  # pyright: ignore[reportArgumentType]
    return source


def test_running_out_of_memory_halves_the_batch(bound: Callable[..., _Diffusion]) -> None:
    name = "python:any.module:name"
    roomy, tight = Sampler(), Sampler(room=5)
    images = given(bound(name), roomy).shard(0).images
    assert torch.equal(given(bound(name), tight).shard(0).images, images)
    assert roomy.batches == [16] * 4
    assert tight.batches == [4] * 16


def test_a_pipeline_that_never_fits(bound: Callable[..., _Diffusion]) -> None:
    with pytest.raises(
        RunError, match=r"python:any\.module:name does not fit in memory even one image at a time"
    ):
        given(bound("python:any.module:name"), Sampler(room=0)).shard(0)


def test_other_errors_of_a_pipeline_are_not_taken_for_a_lack_of_memory(
    bound: Callable[..., _Diffusion],
) -> None:
    class Broken(Sampler):
        def __call__(self, generator: list[torch.Generator], **arguments: Any) -> Any:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        given(bound("python:any.module:name"), Broken()).shard(0)


def test_flagged_images_are_drawn_again_and_never_kept(bound: Callable[..., _Diffusion]) -> None:
    sampler = Sampler(flagged=lambda call: call == 1)
    shard = given(bound("python:any.module:name"), sampler).shard(0)
    assert shard.facts["redrawn"] == 16
    assert shard.facts["notes"] == ["shard 0: 16 images were flagged by the pipeline and drawn again"]
    assert bool((shard.images.flatten(1).float().std(1) > 0).all())
    untouched = given(bound("python:any.module:name"), Sampler()).shard(0).images
    assert torch.equal(shard.images[16:], untouched[16:])
    assert not torch.equal(shard.images[:16], untouched[:16])


def test_a_prompt_that_is_always_refused(bound: Callable[..., _Diffusion]) -> None:
    with pytest.raises(RunError) as error:
        given(bound("python:any.module:name"), Sampler(flagged=lambda call: True)).shard(1)
    assert str(error.value) == (
        "the pipeline's safety checker refused image 64 8 times: give other prompts under proxy.sources"
    )


def test_prompts_come_from_the_parents_classes(bound: Callable[..., _Diffusion]) -> None:
    sampler = Sampler()
    given(bound("python:any.module:name", classes=(("cat",), ("truck",))), sampler).shard(0)
    assert all("cat" in prompt or "truck" in prompt for prompt in sampler.prompts)
    own = Sampler()
    given(bound("python:any.module:name", prompts=("a red ball", "a blue box")), own).shard(0)
    assert own.prompts == ["a red ball", "a blue box"] * 32


def test_labels_are_dealt_evenly(bound: Callable[..., _Diffusion]) -> None:
    sampler = Sampler()
    source = given(bound("python:any.module:name"), sampler, "class-conditional", (4, 7, 1))
    source.shard(0)
    source.shard(1)
    assert sampler.labels == ([4, 7, 1] * 43)[:128]


def test_the_labels_of_a_pipeline_are_checked(
    bound: Callable[..., _Diffusion], folders: Callable[[str], Path]
) -> None:
    with pytest.raises(UsageError, match=r"knows the labels 0 to 9, not 12: correct labels"):
        bound(folders("class"), labels=(3, 12), steps=1).shard(0)


def test_parents_classes_choose_the_labels_a_pipeline_knows_by_name(bound: Callable[..., _Diffusion]) -> None:
    from datafree.proxy.kinds import diffusion

    pipeline = SimpleNamespace(
        labels={"cat": 2, "dog": 5, "cup": 7},
        transformer=SimpleNamespace(config=SimpleNamespace(num_embeds_ada_norm=10)),
    )
    source = bound("python:any.module:name", classes=(("Cat",), ("dog", "tree")))
    assert sorted(source._labels(pipeline)) == [2, 5]
    assert sorted(bound("python:any.module:name")._labels(pipeline)) == list(range(10))
    assert diffusion._classes(pipeline) == 10


def test_a_pipeline_of_the_users_own_file(build: Build, tmp_path: Path) -> None:
    source = {"kind": "diffusion", "pipeline": f"python:{tiny_pipelines.__file__}:unconditional", "steps": 1}
    before = torch.get_rng_state()
    torch.manual_seed(0)
    proxies = build(5, source | {"arguments": {"channels": 1}, "scheduler": "own"})
    torch.set_rng_state(before)
    assert proxies.batch(range(5)).shape == (5, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "python:nothing",
            "is not complete: write python:package.module:callable or python:relative/file.py:callable",
        ),
        ("python:collections:nothing", "collections has no callable 'nothing'"),
        ("python:collections:Counter", "returned a Counter: it must return a diffusers pipeline"),
    ],
)
def test_callables_that_give_no_pipeline(build: Build, name: str, text: str) -> None:
    with pytest.raises(UsageError) as error:
        build(5, {"kind": "diffusion", "pipeline": name})
    assert text in str(error.value)


def test_a_folder_that_is_not_there(build: Build, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        build(5, {"kind": "diffusion", "pipeline": "stabilityai/sdxl-turbo"})
    folder = tmp_path / "stabilityai" / "sdxl-turbo"
    assert str(error.value) == (
        f"diffusion pipeline 'stabilityai/sdxl-turbo': there is no folder {folder}. Give the folder of a pipeline "
        "that diffusers saved (it holds model_index.json), or `allow_download: true` for a name on the hub"
    )


def write_index(folder: Path, **parts: object) -> Path:
    (folder / "unet").mkdir(parents=True)
    described = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], **parts}
    (folder / "model_index.json").write_text(json.dumps(described))
    return folder


def test_nothing_is_fetched_offline(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAFREE_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError) as error:
        build(1, {"kind": "diffusion", "pipeline": "nobody/no-such-pipeline", "allow_download": True})
    assert str(error.value) == (
        "diffusion pipeline 'nobody/no-such-pipeline' could not be fetched (--offline, and it is not in the "
        "hub's cache): save it to a folder where there is a network, and name that"
    )


def test_an_ordinary_folder(build: Build, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match=r"model is not a diffusers pipeline: it holds no model_index\.json"):
        build(5, {"kind": "diffusion", "pipeline": "model"})


def test_pickled_weights_are_refused(build: Build, tmp_path: Path) -> None:
    folder = write_index(tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError) as error:
        build(5, {"kind": "diffusion", "pipeline": "model"})
    assert str(error.value) == (
        f"diffusion pipeline {folder}: unet has only pickled weights (diffusion_pytorch_model.bin), which "
        "can run code when read: save the pipeline again with save_pretrained(..., safe_serialization=True)"
    )


@pytest.mark.parametrize("how", ["file", "class"])
def test_code_in_a_pipeline_is_refused(build: Build, tmp_path: Path, how: str) -> None:
    folder = write_index(
        tmp_path / "model", **({"_class_name": ["mine", "Pipeline"]} if how == "class" else {})
    )
    if how == "file":
        (folder / "unet" / "mine.py").write_text("")
    with pytest.raises(UsageError) as error:
        build(5, {"kind": "diffusion", "pipeline": "model"})
    what = "brings code of its own (unet/mine.py)" if how == "file" else "asks for a class of its own"
    assert str(error.value) == (
        f"diffusion pipeline {folder} {what}, which is not run. If you trust it, build the pipeline in a "
        "Python file of yours and name that: pipeline: python:relative/file.py:callable"
    )


def test_a_folder_whose_weights_are_cut_off(
    bound: Callable[..., _Diffusion], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_pipelines.build("unconditional", tmp_path / "copy")
    weights = next((folder / "unet").glob("*.safetensors"))
    assert load_file(weights)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UsageError, match=rf"diffusion pipeline {folder} cannot be loaded: "):
        bound(folder).shard(0)


def test_a_family_that_is_not_used(bound: Callable[..., _Diffusion]) -> None:
    from datafree.proxy.kinds import diffusion

    class Inpainting:
        def __call__(
            self, prompt: str, image: object, generator: object, num_inference_steps: int = 2
        ) -> None:
            """Needs an image as well."""

    with pytest.raises(UsageError) as error:
        diffusion._family(Inpainting(), "folder")
    assert str(error.value) == (
        "diffusion pipeline folder is a Inpainting, which is not used here: it must make images from "
        "nothing, from "
        "class labels or from a prompt, with a generator (this one takes prompt, image, generator, "
        "num_inference_steps)"
    )


def test_arguments_need_a_callable() -> None:
    with pytest.raises(pydantic.ValidationError, match="`arguments` go to a python: pipeline"):
        DiffusionSpec(pipeline="folder", arguments={"a": 1})


@pytest.mark.slow
def test_the_small_models_of_the_benchmarks_draw_objects_on_black(
    project: Path, shared: Path, bound: Callable[..., _Diffusion]
) -> None:
    for name in ("mnist", "fashion"):
        source = bound(
            f"python:{project / 'benchmarks' / 'ddpm.py'}:pipeline",
            arguments={"weights": str(shared / "checkpoints" / f"brianpulfer_ddpm_{name}.pt")},
            scheduler="own",
            steps=20,
        )
        images = source.shard(0).images.float() / 255
        assert float(images.flatten(1).quantile(0.1, dim=1).mean()) < 0.05  # the background is black
        assert 0.05 < float(images.mean()) < 0.5
        assert float(images.amax((1, 2, 3)).mean()) > 0.6
