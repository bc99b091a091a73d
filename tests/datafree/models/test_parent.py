"""Parents: reference grammar, checkpoints of every kind, preprocessing, and each message."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
from pathlib import Path
from typing import Any

import pydantic
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from datafree.errors import UsageError
from datafree.images.preprocess import GREY_TO_RGB, RGB_TO_GREY, channel_note, match_channels
from datafree.models.parent import Parent, ParentSpec, Preprocess, build_model, load_parent, load_weights
from datafree.models.weights import load_into
from datafree.references import registry as references

PREPROCESS = {"size": 8, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
SOURCE = """
from torch import nn

def net(classes=4):
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216,
    classes))

def trained(classes=4):
    model = net(classes)
    nn.init.constant_(model[4].bias, 7.0)
    return model

def number():
    return 5
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A recipe's folder with a file of Python models in it."""
    (tmp_path / "nets.py").write_text(SOURCE)
    return tmp_path


def spec(**keys: Any) -> ParentSpec:
    return ParentSpec.model_validate({"model": "python:nets.py:net", "preprocess": PREPROCESS, **keys})


def state(base: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_model("python:nets.py:net", {}, base).state_dict()


def refusal(base: Path, **keys: Any) -> str:
    """The text of the error that loading a parent with these keys raises."""
    with pytest.raises(UsageError) as caught:
        load_parent(spec(**keys), "a", base)
    return str(caught.value)


# References -------------------------------------------------------------------------------------------------


def test_every_kind_of_reference_builds(base: Path) -> None:
    for reference, arguments in (
        ("timm:resnet10t", {"num_classes": 3}),
        ("torchvision:squeezenet1_1", {"num_classes": 3}),
        ("python:nets.py:net", {"classes": 3}),
        ("python:datafree.digits:digits_resnet", {"num_classes": 3}),
    ):
        model = build_model(reference, arguments, base)
        assert isinstance(model, nn.Module)
        assert not model.training


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "resnet18",
            r"has no kind. Did you mean 'torchvision:resnet18' or 'timm:resnet18'\? Valid spellings: timm",
        ),
        ("torchvison:resnet18", r"unknown kind 'torchvison'. Did you mean 'torchvision:resnet18'\?"),
        ("timm:", "names nothing after the colon"),
        ("timm:resnet81", r"timm \S+ has no such model; did you mean resnet18"),
        ("torchvision:resnet19", r"torchvision \S+ has no such classifier; did you mean resnet18"),
        ("timm:hf-hub:someone/model", "has no such model"),
        (
            "python:nets.py",
            "is not complete: write python:package.module:callable or python:relative/file.py",
        ),
        (
            "python:other.py:net",
            r"the file \S+other.py does not exist \(paths start from the recipe's folder",
        ),
        ("python:nets.py:nte", "nets.py has no callable 'nte'; did you mean net"),
        ("python:nets.py:number", "returned a int: it must return a torch.nn.Module"),
        (
            "python:no_such_package.models:net",
            "no module named 'no_such_package'; install it, or give a file",
        ),
        ("local-dir:nowhere", "nowhere does not exist: give a folder that datafree or timm saved"),
    ],
)
def test_a_wrong_reference_says_what_is_right(base: Path, reference: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(reference, {}, base)


def test_every_kind_is_listed_when_none_is_known(base: Path) -> None:
    with pytest.raises(UsageError) as caught:
        build_model("quite:wrong", {}, base)
    assert all(spelling in str(caught.value) for spelling in references.SPELLINGS)


def test_a_kind_cannot_be_registered_twice() -> None:
    with pytest.raises(ValueError, match="'timm' is registered already"):
        references.register("timm")(references.BUILDERS["timm"])


def test_a_misspelt_argument_is_named(base: Path) -> None:
    for reference in ("python:nets.py:net", "timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(UsageError, match=r"does not take the arguments \{'clases': 4\}: .*'clases'"):
            build_model(reference, {"clases": 4}, base)


@pytest.mark.parametrize("key", ["pretrained", "weights", "checkpoint_path"])
def test_arguments_cannot_download(base: Path, key: str) -> None:
    with pytest.raises(UsageError, match=f"the argument '{key}' is not passed on, because it may download"):
        build_model("timm:resnet18", {key: True}, base)


# Weights ----------------------------------------------------------------------------------------------------


def test_formats_wrappers_and_prefixes_all_give_the_same_parent(base: Path) -> None:
    whole = state(base)
    prefixed = {f"module.{key}": value for key, value in whole.items()}
    save_file(whole, base / "plain.safetensors")
    torch.save(whole, base / "plain.pt")
    torch.save({"state_dict": prefixed, "epoch": 3}, base / "parallel.th")
    torch.save({"model": {f"_orig_mod.{key}": value for key, value in whole.items()}}, base / "compiled.pth")
    torch.save(whole, base / "old.pth", _use_new_zipfile_serialization=False)
    parents: dict[str, Parent] = {}
    for name in ("plain.safetensors", "plain.pt", "parallel.th", "compiled.pth", "old.pth"):
        parents[name] = load_parent(spec(weights=name), "a", base)
    assert len({parent.fingerprint for parent in parents.values()}) == 1
    assert parents["plain.pt"].notes == ()
    assert parents["parallel.th"].notes == (
        "parallel.th: the state dict stood under 'state_dict'",
        "parallel.th: the prefix 'module.' of every key was stripped",
    )
    assert "'_orig_mod.'" in parents["compiled.pth"].notes[1]


def test_a_parent_is_frozen_described_and_evaluating(base: Path) -> None:
    save_file(state(base), base / "w.safetensors")
    parent = load_parent(spec(weights="w.safetensors", classes=["p", "q", "r", "s"]), "b", base)
    assert (parent.name, parent.outputs, parent.classes) == ("b", 4, ("p", "q", "r", "s"))
    assert parent.weights == base / "w.safetensors"
    assert not parent.module.training
    assert not any(parameter.requires_grad for parameter in parent.module.parameters())


def test_the_fingerprint_follows_the_weights(base: Path) -> None:
    prints = []
    for seed in (0, 0, 1):
        save_file(state(base, seed), base / "w.safetensors")
        prints.append(load_parent(spec(weights="w.safetensors"), "a", base).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_absent_batch_counters_are_tolerated_and_noted(base: Path) -> None:
    counted = state(base)
    save_file(
        {key: value for key, value in counted.items() if "num_batches" not in key}, base / "w.safetensors"
    )
    parent = load_parent(spec(weights="w.safetensors"), "a", base)
    assert parent.notes == (
        "1 num_batches_tracked counters are absent from the file: evaluation ignores them",
    )


def test_half_precision_weights_are_converted_and_noted(base: Path) -> None:
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in state(base).items()}, base / "w.safetensors"
    )
    parent = load_parent(spec(weights="w.safetensors"), "a", base)
    assert parent.notes == ("weights stored as torch.float16 were converted to the model's own type",)
    assert parent.module.state_dict()["0.weight"].dtype == torch.float32


def test_keys_that_do_not_fit_are_listed(base: Path) -> None:
    wrong = state(base)
    wrong["extra.weight"] = wrong.pop("0.bias")
    wrong["4.weight"] = torch.zeros(5, 216)
    save_file(wrong, base / "w.safetensors")
    message = refusal(base, weights="w.safetensors")
    assert message.startswith("parent a: the weights in w.safetensors do not fit the model")
    assert "missing: 0.bias" in message
    assert "unexpected: extra.weight" in message
    assert "wrongly shaped: 4.weight (file (5, 216), model (4, 216))" in message


def test_long_lists_of_keys_are_cut(base: Path) -> None:
    save_file({f"other.{i}": torch.zeros(1) for i in range(20)}, base / "w.safetensors")
    assert "and 14 more" in refusal(base, weights="w.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_name_the_tensor(base: Path, value: float) -> None:
    broken = state(base)
    broken["1.running_var"][2] = value
    save_file(broken, base / "w.safetensors")
    assert "hold NaN or infinity in 1.running_var" in refusal(base, weights="w.safetensors")


class Carrier:
    """Pickles to a call, as an attack would."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", str(self.mark)],)


def test_pickled_code_is_refused_and_not_run(base: Path) -> None:
    mark = base / "ran"
    torch.save({"state_dict": state(base), "extra": Carrier(mark)}, base / "zip.pt")
    with (base / "plain.pt").open("wb") as file:
        pickle.dump(Carrier(mark), file)
    torch.save(build_model("python:nets.py:net", {}, base), base / "module.pt")
    for name in ("zip.pt", "plain.pt", "module.pt"):
        message = refusal(base, weights=name)
        assert "holds pickled Python objects" in message
        assert "unpickling them could run code, so they are refused" in message
    assert "torch.nn.modules.container.Sequential" in refusal(base, weights="module.pt")
    assert not mark.exists()


def test_truncated_files_say_so(base: Path) -> None:
    torch.save(state(base), base / "new.pt")
    torch.save(state(base), base / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state(base), base / "safe.safetensors")
    for name in ("new.pt", "old.pt", "safe.safetensors"):
        content = (base / name).read_bytes()
        for share in (0.3, 0.7, 0.99):
            (base / f"cut-{name}").write_bytes(content[: int(len(content) * share)])
            assert "truncated" in refusal(base, weights=f"cut-{name}"), (name, share)


def test_files_that_are_no_checkpoint_say_so(base: Path) -> None:
    (base / "page.pt").write_text("<html>rate limit exceeded</html>")
    (base / "empty.pth").write_bytes(b"")
    (base / "page.safetensors").write_text("<html>rate limit exceeded</html>")
    (base / "weights.h5").write_bytes(b"\x89HDF")
    torch.save([1, 2, 3], base / "list.pt")
    torch.save({"epoch": 3, "loss": 0.5}, base / "meta.pt")
    torch.save({"state_dict": {"a": 1}}, base / "numbers.pt")
    torch.jit.script(nn.Linear(2, 2)).save(str(base / "script.pt"))  # pyright: ignore[reportAttributeAccessIssue]
    for name, message in (
        (
            "page.pt",
            "is not a PyTorch checkpoint: it looks like a web page or XML: the download did not give",
        ),
        ("empty.pth", "is not a PyTorch checkpoint: it is empty"),
        ("page.safetensors", "is not a safetensors file, or it is truncated"),
        (
            "weights.h5",
            "is not a PyTorch checkpoint: it looks like an HDF5 file (Keras?): export the weights",
        ),
        ("list.pt", "holds no state dict but a list"),
        ("meta.pt", "holds no state dict: tensors by name"),
        ("numbers.pt", "holds no state dict: tensors by name, or such a dict under a name of its own, are"),
        ("script.pt", "is a TorchScript archive: save its state_dict()"),
        ("missing.pt", "missing.pt does not exist: give a .safetensors, .pt, .pth or .th file"),
    ):
        assert message in refusal(base, weights=name), name


def test_no_weights_is_an_error_unless_said(base: Path) -> None:
    assert "has no weights: give `weights: FILE`, or say `random_weights: true`" in refusal(base)
    assert "`weights: builder` if the callable returns a trained model" in refusal(base)
    a, b = (load_parent(spec(random_weights=True), name, base) for name in ("a", "b"))
    assert a.notes == ("the weights are random, as the recipe says",)
    assert a.fingerprint != b.fingerprint
    assert a.fingerprint == load_parent(spec(random_weights=True), "a", base).fingerprint


def test_a_callable_may_return_a_trained_model(base: Path) -> None:
    parent = load_parent(spec(model="python:nets.py:trained", weights="builder"), "a", base)
    assert (parent.module.state_dict()["4.bias"] == 7).all()
    assert parent.notes == ("the weights are those that python:nets.py:trained returned",)
    message = refusal(base, model="timm:resnet18", weights="builder")
    assert "weights: builder says that a python: callable returns a trained model" in message


def test_offline_fetches_no_published_weights(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAFREE_OFFLINE", "1")
    assert refusal(base, model="timm:resnet18", pretrained=True, allow_download=True) == (
        "parent a: pretrained: true may fetch weights, which --offline forbids: name a file under `weights`, "
        "or run without it"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": "w.pt", "random_weights": True}, "weights and random_weights are given together"),
        ({"pretrained": True}, "may fetch weights from the network: say `allow_download: true` as well"),
        (
            {"allow_download": True, "weights": "w.pt"},
            "allow_download: true has no effect without pretrained",
        ),
        ({"weigths": "w.pt"}, "Extra inputs are not permitted"),
    ],
)
def test_contradictory_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=re.escape(message)):
        spec(**keys)


def test_random_state_is_left_alone(base: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_parent(spec(random_weights=True), "a", base)
    assert torch.equal(torch.rand(3), expected)


# Folders that timm and this tool save -----------------------------------------------------------------------


def test_a_folder_saved_by_timm_loads(base: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("resnet10t", num_classes=3)
    folder = base / "saved"
    folder.mkdir()
    config = {
        "architecture": "resnet10t",
        "num_classes": 3,
        "pretrained_cfg": {**model.pretrained_cfg, "num_classes": 3, "input_size": [3, 64, 64]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    parent = load_parent(ParentSpec(model="local-dir:saved"), "a", base)
    assert parent.outputs == 3
    assert parent.preprocess.size == (64, 64)
    assert parent.weights == folder / "model.safetensors"
    assert torch.equal(parent.module.state_dict()["fc.weight"], model.state_dict()["fc.weight"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        load_parent(ParentSpec(model="local-dir:saved"), "a", base)


def test_a_folder_saved_by_neither_is_refused(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "bert"}')
    assert "was saved neither by datafree nor by timm" in refusal(base, model="local-dir:.")
    (base / "config.json").write_text("{")
    assert "is not JSON" in refusal(base, model="local-dir:.")
    (base / "config.json").write_text("[]")
    assert "holds a list, not an object" in refusal(base, model="local-dir:.")


# Preprocessing ----------------------------------------------------------------------------------------------


def test_the_recipe_overrides_the_model_and_the_model_fills_the_rest(base: Path) -> None:
    keys = {"model": "timm:resnet10t", "random_weights": True}
    own = load_parent(ParentSpec.model_validate(keys), "a", base).preprocess
    assert own.size == (176, 176)
    assert own.interpolation == "bicubic"
    changed = load_parent(
        ParentSpec.model_validate({**keys, "preprocess": {"size": 64}}), "a", base
    ).preprocess
    assert changed == Preprocess((64, 64), own.mean, own.std, own.interpolation)
    keys = {"model": "torchvision:resnet18", "random_weights": True}
    published = load_parent(ParentSpec.model_validate(keys), "a", base).preprocess
    assert published == Preprocess((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")


def test_unknown_preprocessing_is_asked_for(base: Path) -> None:
    message = refusal(base, random_weights=True, preprocess={"size": 8})
    assert (
        "does not say how its input is prepared (mean, std unknown): add for example `preprocess:" in message
    )
    keys = {"model": "timm:resnet10t", "random_weights": True, "arguments": {"in_chans": 1}}
    with pytest.raises(UsageError, match=r"\(mean, std unknown\)"):
        load_parent(ParentSpec.model_validate(keys), "a", base)
    keys = {"model": "timm:resnet10t", "random_weights": True, "preprocess": {"mean": (0.5,)}}
    with pytest.raises(UsageError, match="mean has 1 numbers and std 3"):
        load_parent(ParentSpec.model_validate(keys), "a", base)


def test_an_input_that_does_not_fit_is_found_without_running_the_network(base: Path) -> None:
    message = refusal(base, random_weights=True, preprocess={**PREPROCESS, "size": 9})
    assert "the model does not accept an image of 3 x 9 x 9 (channels x height x width)" in message
    assert "classes has 2 names and the model returns 4 numbers" in refusal(
        base, random_weights=True, classes=["p", "q"]
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": 0}, "size is 0: give the input's height and width in pixels"),
        ({"mean": (0.5, 0.5)}, "mean has 2 numbers: give one for grey input or three for RGB"),
        ({"std": (0.5, 0.0, 0.5)}, "every number must be above 0"),
        ({"mean": (0.5,), "std": (0.5, 0.5, 0.5)}, "mean has 1 numbers and std 3"),
        ({"interpolation": "lanczos"}, "Input should be 'bilinear', 'bicubic' or 'nearest'"),
    ],
)
def test_senseless_preprocessing_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=re.escape(message)):
        spec(preprocess={**PREPROCESS, **keys})


def test_preprocessing_normalises_and_leaves_the_right_size_alone() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    preprocess = Preprocess((8, 8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    for channel, (mean, std) in enumerate(zip(preprocess.mean, preprocess.std, strict=True)):
        expected = (images[:, channel].float() / 255 - mean) / std
        torch.testing.assert_close(preprocess(images)[:, channel], expected)


def test_preprocessing_resizes_and_stays_in_range() -> None:
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    images[..., 4:] = 255
    for mode in ("bilinear", "bicubic", "nearest"):
        result = Preprocess((5, 12), (0.0,), (1.0,), mode)(images)
        assert result.shape == (1, 1, 5, 12)
        assert 0 <= result.min() <= result.max() <= 1


def test_channels_are_matched_by_the_stated_rules() -> None:
    grey = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2)
    assert torch.equal(match_channels(grey, 3), grey.expand(1, 3, 2, 2))
    colour = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert match_channels(colour, 1).item() == round(0.299 * 255)
    assert (channel_note(1, 3), channel_note(3, 1), channel_note(3, 3)) == (GREY_TO_RGB, RGB_TO_GREY, None)
    with pytest.raises(UsageError, match="images have 4 channels and the model wants 3"):
        match_channels(torch.zeros(1, 4, 2, 2, dtype=torch.uint8), 3)


def test_images_that_are_not_uint8_are_refused() -> None:
    with pytest.raises(UsageError, match=r"images are torch.float32 \(1, 1, 8, 8\): uint8 of shape"):
        Preprocess((8, 8), (0.0,), (1.0,))(torch.zeros(1, 1, 8, 8))


# Real checkpoints -------------------------------------------------------------------------------------------


def test_third_party_checkpoints_load(shared: Path, project: Path) -> None:
    for name in ("akamaster_resnet20.th", "dansun18_run_8-1_resnet20.th", "zhengjiakun_resnet20.th"):
        model = build_model("python:benchmarks/cifar_resnet.py:resnet20", {}, project)
        loaded, _ = load_weights(shared / "checkpoints" / name)
        notes = load_into(model, loaded, name)
        assert f"{name}: the prefix 'module.' of every key was stripped" in notes
