"""A folder from a stranger: whatever its files say, loading it runs no code, opens no other file, and ends in words."""

from __future__ import annotations

import copy
import json
import random
import resource
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import datafree
import pleas
from datafree.cache.store import DamagedStage, Store, content_hash, stage_key, write_safetensors
from datafree.errors import UsageError
from datafree.images.preprocess import Preprocess
from tests.cases import randomise

INPUT = Preprocess((8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
EVIL = "import pathlib\npathlib.Path(r'{mark}').touch()\n\ndef make(*args, **kwargs):\n    raise SystemExit\n"


class Net(nn.Module):
    """The parents' own class."""

    def __init__(self, width: int = 4, act: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.head, self.act = nn.Linear(width, 5), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.norm(self.stem(x))).mean((2, 3)))


@cache
def merged(apart: float = 0.0) -> pleas.MergeResult:
    a, b = (randomise(Net().eval(), torch.Generator().manual_seed(seed)) for seed in (1, 2))
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return pleas.merge(a, b, [images], apart=apart, settings=pleas.MergeSettings(min_rows=0.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound artefact, with a file beside it that leaves a mark where it is run."""
    saved = datafree.save(
        merged(), tmp_path / "out", preprocess=INPUT, reference="python:net.py:Net", arguments={"width": 4}
    )
    (saved / "evil.py").write_text(EVIL.format(mark=tmp_path / "ran"))
    return saved


def refusal(folder: Path, **keys: Any) -> str:
    """The text of the error that loading the folder raises; nothing of it was run."""
    with pytest.raises(UsageError) as caught:
        datafree.load(folder, **keys)
    assert not (folder.parent / "ran").exists()
    return str(caught.value)


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite config.json after `edit`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


# Code -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference",
    [
        "python:evil.py:make",
        "python:evil:make",
        "python:os:system",
        "local-dir:.",
        "timm:hf-hub:someone/evil",
        "timm:local-dir:.",
        "hf-hub:someone/evil",
        None,
    ],
)
def test_no_reference_of_a_folder_runs_its_code(
    folder: Path, reference: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    change(folder, lambda c: c.update(network=None, architecture={"reference": reference, "arguments": {}}))
    message = refusal(folder)
    if reference is None or not reference.startswith("timm:"):
        assert message == (
            f"{folder} asks for the architecture {reference!r}, and loading an artefact never runs code of its own: "
            "only timm: and torchvision: names are followed. If you have the class and trust it, pass it: "
            "datafree.load(folder, model=MyClass)"
        )
    else:
        assert "no such model" in message


@pytest.mark.parametrize(
    ("reference", "arguments", "message"),
    [
        (
            "timm:resnet18",
            {"model_name": "hf-hub:someone/evil"},
            "the argument 'model_name' would name another model",
        ),
        (
            "torchvision:resnet18",
            {"name": "resnet50"},
            "the argument 'name' would name another model: remove it",
        ),
        ("timm:resnet18", {"checkpoint_path": "evil.pth"}, "the argument 'checkpoint_path' is not passed on"),
        (
            "timm:resnet18",
            {"pretrained_cfg_overlay": {"url": "x"}},
            "'pretrained_cfg_overlay' is not passed on",
        ),
        ("timm:resnet18", {"pretrained": True}, "the argument 'pretrained' is not passed on"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "the argument 'weights' is not passed on"),
        ("timm:resnet18", {"num_classes": 10**12}, ""),
        ("torchvision:resnet18", {"width_per_group": 10**6}, ""),
        ("timm:resnet18", {"layers": [10**9, 2, 2, 2]}, "has many more weights than the file"),
        ("timm:resnet18", {}, "has many more weights than the file"),
        ("timm:resnet18.evil", {}, ""),
        ("timm:resnet18", {"act_layer": "no_such_layer"}, "timm:resnet18 with the arguments {'act_layer'"),
    ],
)
def test_a_library_name_cannot_fetch_read_or_fill_the_memory(
    folder: Path, reference: str, arguments: dict[str, Any], message: str
) -> None:
    change(
        folder,
        lambda c: c.update(network=None, architecture={"reference": reference, "arguments": arguments}),
    )
    assert message in refusal(folder)


TOUCH = "__import__('pathlib').Path(r'{mark}').touch()"


def _inject(place: str, code: str) -> Callable[[dict[str, Any]], None]:
    """An edit that writes `code` where `fx` would copy it into the source it runs."""

    def edit(config: dict[str, Any]) -> None:
        graph, tensors = config["network"]["graph"], config["network"]["tensors"]
        node = next(node for node in graph if node["op"] == place.partition(" ")[0])
        match place:
            case "placeholder target":
                node["target"] = f"x={code}"
            case "placeholder name":
                node["name"] = f"x={code}"
            case "call_function kwargs":
                node["kwargs"] = {f"alpha={code}, beta": 1}
            case "get_attr target":
                name = f'weight", {code}) or ("'
                tensors[name] = tensors[node["target"]]
                node["target"] = name
            case "call_function method":
                node.update(op="call_method", target="tofile")
            case "call_function target":
                node["target"] = code
            case "call_function torch":
                node["args"] = [{"torch": "load"}]
            case "call_function file":
                node.update(target="aten.from_file.default", args=["/etc/passwd", False, 10], kwargs={})
            case "call_function save":
                node.update(target="aten.save.default", args=[1, "/tmp/never"], kwargs={})

    return edit


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("placeholder target", "is not a plain name"),
        ("placeholder name", "is not a plain name"),
        ("call_function kwargs", "is not a plain name"),
        ("get_attr target", "is not a plain name"),
        ("call_function method", "'call_method' is none of placeholder, get_attr"),
        ("call_function target", "only aten ops and plain operators are allowed"),
        ("call_function torch", "torch.load is no dtype, layout or memory format"),
        ("call_function file", "takes a text (filename), which could name a file"),
        ("call_function save", ""),
    ],
)
def test_a_graph_cannot_carry_code_or_open_files(folder: Path, place: str, message: str) -> None:
    change(folder, _inject(place, TOUCH.format(mark=folder.parent / "ran")))
    said = refusal(folder)
    assert message in said
    assert said.startswith(f"{folder / 'config.json'} describes no network of ours")


def test_pleas_alone_refuses_the_same(tmp_path: Path) -> None:
    config = {"network": copy.deepcopy(pleas.program_config(merged(0.5).module))}
    assert config["network"] is not None
    _inject("placeholder target", TOUCH.format(mark=tmp_path / "ran"))(config)
    with pytest.raises(
        pleas.InputError, match=r"module config, graph\[\d+\]\.target: .* is not a plain name"
    ):
        pleas.module_from_config(config["network"])
    assert not (tmp_path / "ran").exists()


def test_only_files_are_read(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        path = folder / name
        path.rename(folder / "kept")
        path.symlink_to("/dev/zero")
        refusal(folder)
        path.unlink()
        path.mkdir()
        refusal(folder)
        path.rmdir()
        (folder / "kept").rename(path)
    datafree.load(folder)


# One's own class --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Net, Net(), lambda: Net(width=4)])
def test_the_own_class_comes_back_where_it_is_passed(folder: Path, model: Any) -> None:
    loaded = datafree.load(folder, model=model).module
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    assert isinstance(loaded, Net)
    assert not loaded.training
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), datafree.load(folder).module(images))


def test_a_folder_without_a_graph_is_loaded_into_the_class_that_is_passed(folder: Path) -> None:
    change(folder, lambda c: c.update(network=None))
    assert "datafree.load(folder, model=MyClass)" in refusal(folder)
    assert isinstance(datafree.load(folder, model=Net).module, Net)


def test_another_class_is_refused(folder: Path) -> None:
    message = refusal(folder, model=lambda: Net(width=5))
    assert "wrongly shaped: stem.weight (file (4, 3, 3, 3), model (5, 3, 3, 3))" in message
    assert (
        "Either the module given as model= is not the class that was merged; config.json names the arguments "
        "{'width': 4}, for example model=lambda: MyClass(...)"
    ) in message
    assert "has the tensors of" in refusal(folder, model=lambda: Net(act=torch.sigmoid))
    assert "model= gave a int: pass a torch.nn.Module" in refusal(folder, model=lambda: 5)


def test_a_wider_network_is_no_class(tmp_path: Path) -> None:
    wide = datafree.save(merged(0.5), tmp_path / "wide", preprocess=INPUT)
    message = refusal(wide, model=Net)
    assert "wrongly shaped: stem.weight (file (6, 3, 3, 3), model (4, 3, 3, 3))" in message
    assert message.endswith(
        "or the network is wider than its class, as above 1.0x: load it without model=, as the graph it was saved as"
    )


# Damage -----------------------------------------------------------------------------------------------------


def _rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_safetensors(folder / "model.safetensors", tensors, {"sha256": content_hash(tensors)})


def test_sizes_are_compared_before_memory_is_taken(folder: Path) -> None:
    change(folder, lambda c: c["network"]["tensors"]["stem.weight"].update(shape=[2**30, 2**10]))
    assert "model.safetensors does not fit the network in config.json: stem.weight differs" in refusal(folder)


def test_unknown_types_of_numbers_are_named(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"F99"', 1))
    assert "cannot be read" in refusal(folder)
    _rewrite(folder, tensors | {"more": torch.zeros(2)})
    assert "does not fit the network in config.json: more differs" in refusal(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(heads=[]), "heads: List should have at least 1 item"),
        (lambda c: c.update(heads=5), "heads: Input should be a valid list"),
        (lambda c: c["heads"][0].pop("classes"), "heads.0.classes: Field required"),
        (lambda c: c.pop("network"), "network: Field required"),
        (lambda c: c["input"].update(std=[0.0]), "input: Value error, mean and std do not fit"),
        (lambda c: c.update(format="1"), "has format '1', and this version of datafree reads format 1"),
        (lambda c: c["network"].pop("graph"), "module config, graph: a list is expected"),
        (lambda c: c["network"].update(format=7), "module config has format 7"),
        (lambda c: c["network"]["graph"].pop(), "graph: one output is expected, at the end"),
        (lambda c: c["network"]["graph"].pop(0), "is not computed before"),
    ],
)
def test_a_damaged_description_names_its_place(folder: Path, edit: Any, message: str) -> None:
    change(folder, edit)
    assert message in refusal(folder)


def test_nested_without_end(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    assert "is not JSON" in refusal(folder)


def _damaged(whole: bytes, chance: random.Random) -> bytes:
    """Truncated, bits flipped, a piece overwritten, doubled or left out."""
    data, place, count = bytearray(whole), chance.randrange(len(whole)), chance.randrange(1, 100)
    match chance.randrange(5):
        case 0:
            del data[place:]
        case 1:
            for _ in range(chance.choice([1, 2, 8])):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 2:
            data[place : place + count] = bytes(chance.choice([b"\x00", b"9", b'"', b"["])) * count
        case 3:
            data[place:place] = data[place : place + count]
        case 4:
            del data[place : place + count]
    return bytes(data)


def _mutated(value: Any, chance: random.Random) -> Any:
    """JSON of another meaning: one value somewhere inside becomes another kind, huge, empty or absent."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.9:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if chance.random() < 0.1:
            value.pop(key)
        else:
            value[key] = _mutated(value[key], chance)
        return value
    return chance.choice(
        [None, True, -1, 10**12, 1e308, "", "x", "aten.zeros.default", "../x", [], [[]], {}, {"node": "x"}]
    )


@pytest.mark.parametrize("seed", range(3))
def test_damaged_folders_end_in_words(tmp_path: Path, seed: int) -> None:
    sound = datafree.save(merged(0.5), tmp_path / "out", preprocess=INPUT)
    whole = {name: (sound / name).read_bytes() for name in ("config.json", "model.safetensors")}
    chance, refused = random.Random(seed), 0
    for number in range(150):
        name = chance.choice(sorted(whole))
        if name == "config.json" and number % 2:
            data = json.dumps(_mutated(json.loads(whole[name]), chance)).encode()
        else:
            data = _damaged(whole[name], chance)
        (sound / name).write_bytes(data)
        try:
            datafree.load(sound)
        except UsageError as error:
            refused += str(error).startswith(str(sound)) or f"{error}".count(str(sound)) > 0
        (sound / name).write_bytes(whole[name])
    assert refused > 80
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 3 << 30


def test_damaged_cache_entries_are_named(tmp_path: Path) -> None:
    store, key, chance = Store(tmp_path), stage_key("stage", {"x": 1}), random.Random(3)
    store.write(
        "stage", key, {"a": torch.randn(20), "b": torch.zeros(3, dtype=torch.int64)}, {"rows": [1, 2]}
    )
    path = store.path("stage", key)
    whole, named = path.read_bytes(), 0
    for _ in range(200):
        path.write_bytes(_damaged(whole, chance))
        try:
            store.read("stage", key)
        except DamagedStage as error:
            named += str(error).startswith(str(path))
    assert named > 150
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedStage, match="is not a file"):
        store.read("stage", key)
