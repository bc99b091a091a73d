"""Files that users write: what works, and how each thing that goes wrong there is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from datafree.cli import main
from datafree.errors import UsageError
from datafree.models.parent import ParentSpec, load_parent
from datafree.references.registry import build, build_model
from tests.datafree.tiny import NETWORK, make_tiny

NET = "from torch import nn\n\ndef net():\n    return nn.Linear(2, 3)\n"


def write(folder: Path, **files: str) -> Path:
    """Python files in `folder`; `_in_` in a name stands for a folder, `net_in_nets` is nets/net.py."""
    for name, text in files.items():
        path = folder.joinpath(*reversed(name.split("_in_"))).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def refusal(folder: Path, reference: str, **arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        build_model(reference, arguments, folder)
    return str(caught.value)


# Imports that work ------------------------------------------------------------------------------------------


def test_what_lies_beside_a_file_can_be_imported(tmp_path: Path) -> None:
    for place in ("one", "two"):  # the same names with other content
        text = f"WIDTH = {len(place) if place == 'one' else 4}\n"
        write(
            tmp_path / place,
            sizes_of_mine=text,
            net="from torch import nn\nfrom sizes_of_mine import WIDTH\n\ndef net():\n    import late_of_mine\n"
            "    return nn.Linear(2, WIDTH + late_of_mine.MORE)\n",
            late_of_mine="MORE = 1\n" if place == "one" else "MORE = 10\n",
        )
    before = list(sys.path)
    widths = [
        build_model(f"python:{place}/net.py:net", {}, tmp_path).out_features
        for place in ("one", "two", "one")
    ]
    assert widths == [4, 14, 4]
    assert sys.path == before


@pytest.mark.parametrize("package", [True, False])
def test_relative_imports_work(tmp_path: Path, package: bool) -> None:
    write(tmp_path, blocks_in_nets="WIDTH = 3\n", net_in_nets=f"from .blocks import WIDTH\n{NET}")
    if package:
        write(tmp_path, __init___in_nets="", __init___in_sub_in_nets="")
        write(
            tmp_path,
            deep_in_sub_in_nets=f"from ..blocks import WIDTH\nfrom nets.blocks import WIDTH as W\n{NET}",
        )
        assert isinstance(build_model("python:nets/sub/deep.py:net", {}, tmp_path), nn.Linear)
    assert isinstance(build_model("python:nets/net.py:net", {}, tmp_path), nn.Linear)


def test_a_package_beside_the_recipe_has_a_dotted_name(tmp_path: Path) -> None:
    write(tmp_path, __init___in_package_of_mine="", nets_in_package_of_mine=NET)
    assert isinstance(build_model("python:package_of_mine.nets:net", {}, tmp_path), nn.Linear)


def test_a_file_of_any_name_is_executed_once(tmp_path: Path) -> None:
    path = tmp_path / "my-net 2.py"
    path.write_text(
        "from torch import nn\n\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 3)\n"
    )
    classes = {type(build_model(f"python:{path}:Net", {}, tmp_path)) for _ in range(2)}
    assert len(classes) == 1


# What goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\nimport no_such_package_here\n",
            "line 2: ModuleNotFoundError: No module named 'no_such_package_here'. Install what is missing, or put it "
            "beside the file",
        ),
        ("x = 1\ndef net(:\n", "line 2: SyntaxError: invalid syntax"),
        ("from .nowhere import x\n", "line 1: ModuleNotFoundError: No module named 'datafree_reference_"),
        (
            "from ....nowhere import x\n",
            "line 1: ImportError: attempted relative import beyond top-level package",
        ),
        ("\n\nopen('/no/such/file')\n", "line 3: FileNotFoundError: [Errno 2] No such file or directory"),
        ("assert False, 'never'\n", "line 1: AssertionError: never"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3. Importing a model must not end the program"),
        ("class Odd(BaseException): pass\nraise ValueError('a\\nb')\n", "line 2: ValueError: a b"),
        (
            f"{NET}\nnet = net()\n",
            "'net' in net.py is a model, not what builds one; all parents would share it. Name",
        ),
        (NET.replace("return nn", "raise KeyError('k')\n    return nn"), "line 4: KeyError: 'k'"),
        (
            NET.replace("(2, 3)", "(2, bias=3, devise=4)"),
            "line 4: TypeError: Linear.__init__() got an unexpected",
        ),
        (NET.replace("(2, 3)", "(2)"), "line 4: TypeError: Linear.__init__() missing 1 required"),
        (
            "from torch import nn\n\ndef net():\n    return nn.Linear\n",
            "returned a type: it must return a torch.nn.M",
        ),
    ],
)
def test_the_place_is_that_of_the_users_own_line(tmp_path: Path, text: str, message: str) -> None:
    said = refusal(write(tmp_path, net=text), "python:net.py:net")
    assert said.startswith("python:net.py:net")
    assert message in said
    if "line" in message:
        assert f"fails at {tmp_path / 'net.py'}, {message.partition(':')[0]}: " in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where .cuda() works")
def test_cuda_in_a_factory_is_named(tmp_path: Path) -> None:
    said = refusal(write(tmp_path, net=NET.replace("(2, 3)", "(2, 3).cuda()")), "python:net.py:net")
    assert f"fails at {tmp_path / 'net.py'}, line 4: " in said
    assert said.endswith("Build the model on the CPU, without .cuda(): it is moved where --device says")


def test_a_wrong_argument_and_a_fault_inside_are_two_things(tmp_path: Path) -> None:
    text = "from torch import nn\n\ndef net(width, **more):\n    return nn.Linear(2, width, **more)\n"
    write(tmp_path, net=text)
    assert refusal(tmp_path, "python:net.py:net") == (
        "python:net.py:net does not take the arguments {}: missing a required argument: 'width'"
    )
    assert "does not take the arguments {'width': 3, 'biass': 1}: " in refusal(
        tmp_path, "python:net.py:net", width=3, biass=1
    )
    assert (
        "python:net.py:net with the arguments {'width': 'x'} fails at "
        f"{tmp_path / 'net.py'}, line 4: TypeError: "
    ) in refusal(tmp_path, "python:net.py:net", width="x")


def test_the_fault_of_a_library_names_reference_and_arguments(tmp_path: Path) -> None:
    assert "timm:resnet18 with the arguments {'num_classes': 'x'} fails: TypeError: " in refusal(
        tmp_path, "timm:resnet18", num_classes="x"
    )


def test_printing_does_not_reach_the_json(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "tiny")
    loud = NETWORK.replace("def net(", "print('imported')\n\ndef net(").replace(
        "    return Net(", "    print('built')\n    return Net("
    )
    (tiny.folder / "loud.py").write_text(loud)
    changed = [f"--set=parents.{name}.model=python:loud.py:net" for name in "ab"]
    result = CliRunner().invoke(main, ["check", str(tiny.recipe), "--json", *changed])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ok"]
    assert "imported" in result.stderr
    assert "built" in result.stderr


def test_the_command_line_ends_with_2_and_one_line(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "tiny")
    (tiny.folder / "other.py").write_text("import no_such_package_here\n")
    changed = "--set=parents.a.model=python:other.py:net"
    result = CliRunner().invoke(main, ["check", str(tiny.recipe), changed])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    where = tiny.folder / "other.py"
    assert (
        f"parents.a: parent a: python:other.py:net fails at {where}, line 1: ModuleNotFound" in result.stderr
    )


# What a factory may return ----------------------------------------------------------------------------------

WRAPPED = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, inside=False):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten()), nn.Linear(108, 2)
        if inside:
            self.body = nn.DataParallel(torch.compile(self.body))

    def forward(self, x):
        return self.head(self.body(x))

def plain():
    return Net()

def compiled():
    return torch.compile(Net())

def in_place():
    net = Net()
    net.compile()
    return net

def parallel():
    return nn.DataParallel(torch.compile(nn.DataParallel(Net())))

def inside():
    return Net(inside=True)

def meta():
    with torch.device("meta"):
        return Net()

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))

def script():
    return torch.jit.script(Net())
"""


@pytest.mark.parametrize("name", ["compiled", "parallel", "in_place", "inside"])
def test_wrappers_are_taken_off_and_said(tmp_path: Path, name: str) -> None:
    write(tmp_path, nets=WRAPPED)
    made = build(f"python:nets.py:{name}", {}, tmp_path)
    plain = build_model("python:nets.py:plain", {}, tmp_path)
    assert type(made.module) is type(plain)
    assert made.module.state_dict().keys() == plain.state_dict().keys()
    assert made.module._compiled_call_impl is None
    assert any(note.endswith("which was taken off") for note in made.notes)
    spec = {"model": f"python:nets.py:{name}", "random_weights": True}
    preprocess = {"size": 8, "mean": [0.5], "std": [0.5]}
    parent = load_parent(ParentSpec.model_validate(spec | {"preprocess": preprocess}), "a", tmp_path)
    assert parent.notes[: len(made.notes)] == made.notes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "meta",
            "returned tensors without values (device meta: body.0.weight and 3 more): build the network on the CPU",
        ),
        (
            "lazy",
            "returned a network whose shapes are not known yet (1.weight): give its lazy layers their sizes",
        ),
        ("script", "returned a TorchScript module: return the torch.nn.Module it was made from"),
    ],
)
def test_modules_without_values_are_refused(tmp_path: Path, name: str, message: str) -> None:
    assert message in refusal(write(tmp_path, nets=WRAPPED), f"python:nets.py:{name}")


def test_a_fault_in_forward_is_located_too(tmp_path: Path) -> None:
    write(tmp_path, nets=WRAPPED.replace("return self.head(", "return {}['key']("))
    spec = {
        "model": "python:nets.py:plain",
        "random_weights": True,
        "preprocess": {"size": 8, "mean": [0.5], "std": [0.5]},
    }
    with pytest.raises(UsageError) as caught:
        load_parent(ParentSpec.model_validate(spec), "a", tmp_path)
    line = (tmp_path / "nets.py").read_text().splitlines().index("        return {}['key'](self.body(x))") + 1
    assert (
        "the model does not accept an image of 1 x 8 x 8 (channels x height x width): KeyError: 'key' (at "
        in str(caught.value)
    )
    assert f"(at {tmp_path / 'nets.py'}, line {line}). Check preprocess" in str(caught.value)
