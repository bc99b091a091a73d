"""Checkpoints as people publish them: which entry is taken, under which names, in which numbers, and what is said."""

from __future__ import annotations

import argparse
import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from datafree.errors import UsageError
from datafree.models.parent import ParentSpec, load_parent
from datafree.models.weights import load_into, load_weights


class Net(nn.Module):
    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def weights(seed: int = 0, model: type[nn.Module] = Net) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(model().state_dict())


def load(
    path: Path, model: nn.Module | None = None, key: str | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    model = model or Net()
    state, notes = load_weights(path, key, model)
    return model, (*notes, *load_into(model, state, path.name))


def refusal(path: Path, model: nn.Module | None = None, key: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        load(path, model, key)
    return str(caught.value)


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key in state)


# Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.pth.tar", "w", "w.tar", "w.model", "w.safetensors", "w.weights.h5"])
def test_the_ending_says_nothing(tmp_path: Path, name: str) -> None:
    for write in (torch.save, save_file):
        write(weights(), tmp_path / name)
        assert same(load(tmp_path / name)[0], weights())


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    for content, message in (
        (gzip.compress(b"x"), "it looks like compressed with gzip: unpack it first"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            "a Git LFS pointer, not the file itself: fetch it with `git lfs",
        ),
        ((tmp_path / "w.npz").read_bytes(), "is a zip archive but no PyTorch checkpoint (arrays of NumPy)"),
        (b"\x00" * 257 + b"ustar" + b"\x00" * 300, "it looks like a tar archive: unpack it"),
    ):
        path.write_bytes(content)
        assert message in refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_another_pickle_protocol_is_called_that(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "w.pt"
    torch.save(weights(), path, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    assert refusal(path) == (
        f"{path} was saved with pickle protocol 4, and only protocol 2 can be read without running code: load it where "
        "you trust it and save it again, torch.save(state_dict, FILE) without pickle_protocol"
    )
    path.write_bytes(pickle.dumps({"a": argparse.ArgumentParser}))
    assert "holds pickled Python objects" in refusal(path)


def test_the_arguments_of_a_training_script_are_let_through(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": weights(), "args": argparse.Namespace(lr=0.1), "epoch": 3}, path)
    assert load(path)[1] == ("w.pth: the state dict stood under 'model'",)


# Entries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state_dict", "net", "generator", "params_ema", "whatever"])
def test_the_one_state_dict_is_taken_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.pth"
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(2))], momentum=0.9)
    content = {name: weights(), "optimizer": optimiser.state_dict(), "best": torch.tensor(93.2), "epoch": 3}
    torch.save(content, path)
    model, notes = load(path)
    assert same(model, weights())
    assert notes == (f"w.pth: the state dict stood under {name!r}",)
    torch.save({"outer": {name: weights()}}, path)
    assert load(path)[1] == (f"w.pth: the state dict stood under 'outer.{name}'",)


def test_several_are_named_and_a_key_chooses(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": weights(1), "model_ema": {"module": weights(2)}, "epoch": 3}, path)
    assert refusal(path) == (
        f"{path} holds several state dicts: 'model' (9 tensors), 'model_ema.module' (9 tensors). Say which one to "
        "take, for example `weights_key: model`"
    )
    for key, seed in (("model", 1), ("model_ema.module", 2)):
        model, notes = load(path, key=key)
        assert same(model, weights(seed))
        assert notes == (f"w.pth: the state dict under {key!r} was taken, as weights_key says",)
    assert refusal(path, key="model_ema.modul") == (
        f"weights_key: {path} has no state dict under 'model_ema.modul'; did you mean 'model_ema.module'? (it has "
        "'model', 'model_ema.module')"
    )
    torch.save(weights(), path)
    assert "the file itself is one state dict: remove it" in refusal(path, key="model")


def test_the_one_that_fits_is_taken_and_the_others_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"generator": weights(1), "discriminator": {"conv.weight": torch.zeros(2)}}, path)
    model, notes = load(path)
    assert same(model, weights(1))
    assert notes[1] == "w.pth: 'discriminator' in the same file does not fit the model and was left"


def test_the_recipes_key_reaches_the_file(tmp_path: Path) -> None:
    torch.save({"model": weights(1), "model_ema": weights(2)}, tmp_path / "w.pth")
    keys = {
        "model": "python:tests.datafree.models.test_weights:Net",
        "weights": "w.pth",
        "weights_key": "model_ema",
    }
    keys |= {"preprocess": {"size": 8, "mean": (0.5,), "std": (0.5,)}}
    parent = load_parent(ParentSpec.model_validate(keys), "a", tmp_path)
    assert same(parent.module, weights(2))
    with pytest.raises(UsageError, match=r"parent a: weights_key: .* did you mean 'model_ema'") as caught:
        load_parent(ParentSpec.model_validate(keys | {"weights_key": "model_em"}), "a", tmp_path)
    assert caught.value.key == ("weights_key",), "so that a recipe's error says where that key stands"
    with pytest.raises(ValueError, match="weights_key names an entry of a weights file, and there is none"):
        ParentSpec.model_validate({"model": "timm:resnet18", "random_weights": True, "weights_key": "x"})


# Names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["net.", "model.", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.model."],
)
def test_prefixes_are_stripped_to_the_end(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file({prefix + key: value for key, value in weights().items()}, path)
    model, notes = load(path)
    assert same(model, weights())
    assert len(notes) == prefix.count(".")
    assert all(note.endswith("of every key was stripped") for note in notes)


class Wrapped(nn.Module):
    """A model whose own keys begin with a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.extra = Net(), nn.Linear(2, 2)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()


def test_a_prefix_that_the_model_has_stays(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for model in (Held, Wrapped):
        for prefix in ("", "module.", "model."):
            state = weights(3, model)
            save_file({prefix + key: value for key, value in state.items()}, path)
            loaded, notes = load(path, model())
            assert same(loaded, state)
            assert len(notes) == (1 if prefix else 0)


def test_wrappers_inside_are_stripped(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = {
        key.replace("model.", "model._orig_mod.module."): value for key, value in weights(0, Wrapped).items()
    }
    save_file(state, path)
    loaded, notes = load(path, Wrapped())
    assert same(loaded, weights(0, Wrapped))
    assert notes == ("w.safetensors: 'module.' and '_orig_mod.' inside the keys were stripped",)


def test_counters_are_dropped_and_said(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    counted = weights() | {"total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)}
    torch.save({f"module.{key}": value for key, value in counted.items()}, path)
    model, notes = load(path)
    assert same(model, weights())
    assert notes[-1] == "w.pth: 2 counters (total_ops, total_params) were dropped: the model has none"


def test_batch_counters_are_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(weights(), path)
    model = Net()
    model.norm = nn.Sequential()  # pyright: ignore[reportAttributeAccessIssue]
    plain = {key: value for key, value in weights().items() if not key.startswith("norm.")}
    save_file(plain | {"norm.num_batches_tracked": torch.tensor(5)}, path)
    assert load(path, model)[1] == (
        "w.safetensors: 1 counters (num_batches_tracked) were dropped: the model has none",
    )


def test_the_models_own_hooks_translate(tmp_path: Path) -> None:
    old = nn.utils.weight_norm(nn.Linear(3, 2))
    path = tmp_path / "w.pth"
    torch.save({f"module.{key}": value for key, value in old.state_dict().items()}, path)
    assert "weight_g" in old.state_dict()
    model, _ = load(path, nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    images = torch.randn(4, 3)
    torch.testing.assert_close(model(images), old(images))


def test_tied_tensors_may_be_stored_once(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    state = {key: value.clone() for key, value in tied().state_dict().items() if key != "1.weight"}
    save_file(state, tmp_path / "w.safetensors")
    model, _ = load(tmp_path / "w.safetensors", tied())
    assert torch.equal(model.state_dict()["1.weight"], state["0.weight"])


def test_nothing_is_loaded_where_something_does_not_fit(tmp_path: Path) -> None:
    path, model = tmp_path / "w.safetensors", Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(weights() | {"head.bias": torch.zeros(5)}, path)
    assert "wrongly shaped: head.bias (file (5,), model (2,))" in refusal(path, model)
    assert same(model, before)


# Numbers ----------------------------------------------------------------------------------------------------

ODD = [
    torch.int8, torch.int64, torch.uint8, torch.uint16, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", ODD)
@pytest.mark.parametrize("write", [torch.save, save_file])
def test_numbers_that_are_no_weights_are_refused(tmp_path: Path, dtype: torch.dtype, write: Any) -> None:
    path = tmp_path / "w.pt"
    write(weights() | {"conv.weight": weights()["conv.weight"].abs().to(dtype)}, path)
    assert refusal(path) == (
        f"the weights in w.pt are stored as other numbers than weights are: conv.weight ({str(dtype)[6:]}); such "
        "files are quantised or packed and need their own code to be read. Give the checkpoint in float32, float16 or "
        "bfloat16 it was made from, or convert it back first"
    )


def test_quantised_and_sparse_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    whole = weights()["head.weight"]
    for odd, kind in (
        (torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8), "quantised"),
        (whole.to_sparse(), "sparse_coo"),
        (whole.to("meta"), "without values"),
    ):
        torch.save(weights() | {"head.weight": odd}, path)
        assert f"head.weight ({kind}); such files" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted_and_said(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "w.pt"
    torch.save({key: value.to(dtype) for key, value in weights().items()}, path)  # the counter too
    model, notes = load(path)
    assert notes == (f"weights stored as {dtype} were converted to the model's own type",)
    assert torch.equal(model.state_dict()["head.bias"], weights()["head.bias"].to(dtype).float())


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("index", torch.tensor([3, 4]))
    path = tmp_path / "w.pt"
    torch.save(model.state_dict() | {"index": torch.tensor([5, 6], dtype=torch.int32)}, path)
    assert load(path, model)[0].state_dict()["index"].tolist() == [5, 6]
    torch.save(model.state_dict() | {"index": torch.tensor([5.5, 6])}, path)
    assert "other numbers than weights are: index (float32)" in refusal(path, model)


def test_numbers_that_overflow_are_found(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(weights() | {"head.bias": torch.tensor([1e300, 0], dtype=torch.float64)}, path)
    assert "hold NaN or infinity in head.bias" in refusal(path)
