"""`datafree inspect` on models: what every group governs, why axes stay in place, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from datafree.cli import main

NETWORKS = '''
import torch
from torch import nn
from torch.nn import functional as F


class Plain(nn.Sequential):
    """8 channels, of which 3 x 3 x 3 inputs; 5 classes."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(48, 6), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.norm(torch.softmax(self.stem(x.flatten(1)), 1)))


class Sorting(Normed):
    def forward(self, x):
        return self.head(torch.sort(self.stem(x.flatten(1))).values)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.route = nn.Parameter(torch.randn(2, 4 * 3)), nn.Linear(3, 2)

    def forward(self, x):
        kernels = (torch.sigmoid(self.route(x.mean((2, 3)))) @ self.weight).reshape(-1, 3, 1, 1)
        out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, groups=x.shape[0])
        return out.reshape(x.shape[0], 4, *x.shape[2:])


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), Expert())
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        if x.mean() > 0:
            return x * self.scale
        return x


class Branching(Conditional):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), Gate(), nn.Conv2d(3, 4, 1))
'''


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks") / "networks.py"
    path.write_text(NETWORKS)
    return path


def _inspect(networks: Path, name: str, *options: str) -> Result:
    return CliRunner().invoke(
        main, ["inspect", f"python:{networks}:{name}", "--input", "3x4x4", *options], catch_exceptions=False
    )


def test_every_group_says_what_it_governs(networks: Path) -> None:
    result = _inspect(networks, "Plain", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    channels, output = facts["classes"]
    first, depthwise, head = 16 * 8 * 27, 16 * 8 * 9, 8 * 5  # multiply-adds, on 4 x 4 positions
    assert channels["multiply_adds"] == first + depthwise + head
    assert output["multiply_adds"] == head
    assert channels["parameters"] == 8 * 27 + 16 + 8 * 9 + 8 + 8 * 5
    assert output["parameters"] == 8 * 5 + 5
    assert (facts["parameters"], facts["multiply_adds"]) == (357, first + depthwise + head)
    assert facts["supported"] is True


def test_the_text_names_couplings_widths_and_reasons(networks: Path) -> None:
    text = _inspect(networks, "Plain").stdout
    lines = text.splitlines()
    assert lines[0].split()[:6] == ["group", "kind", "units", "parameters", "multiply-adds", "widens"]
    assert lines[2].split()[:6] == ["0", "channel", "8", "352", "4,648", "yes"]
    assert lines[2].endswith("0.weight[out] - 1.* - 3.weight[out] - 3.weight[in] - 3.* - 7.weight[in]")
    assert "no: it is the output" in lines[3]
    assert "  a channel of the image has its place: 0.weight[1]\n" in text
    assert (
        "  a position in the kernel of a convolution has its place: 0.weight[2, 3], 3.weight[2, 3]\n" in text
    )
    assert "no: a softmax runs over it" in _inspect(networks, "Normed").stdout


def test_an_op_without_a_rule_is_named_with_its_place_and_a_way_out(networks: Path) -> None:
    text = _inspect(networks, "Sorting").stdout
    assert "  sort in the model itself: stem.weight, stem.bias" in text
    assert "what would help: a symmetry rule (docs/add_an_op.md)" in text
    strict = _inspect(networks, "Sorting", "--strict", "--json")
    assert strict.exit_code == 2
    (operation,) = json.loads(strict.stdout)["operations"]
    assert (operation["op"], operation["module"]) == ("sort", "")
    assert "stem.weight" in operation["parameters"]
    assert "docs/add_an_op.md" in operation["help"]


def test_a_refused_op_is_named_with_its_place_and_parameters(networks: Path) -> None:
    result = _inspect(networks, "Conditional")
    assert result.exit_code == 2
    assert result.stdout == ""
    for part in ("in module 'body.1'", "The parameters behind it: body.1.weight", "What would help: a plain"):
        assert part in result.stderr
    refusal = _inspect(networks, "Conditional", "--json")
    assert refusal.exit_code == 2
    facts = json.loads(refusal.stdout)
    assert facts["supported"] is False
    assert refusal.stderr == f"error: {facts['error']}\n"
    (operation,) = facts["operations"]
    assert (operation["op"], operation["module"]) == ("convolution", "body.1")
    assert "body.1.weight" in operation["parameters"]


def test_a_forward_that_cannot_be_exported_says_where(networks: Path) -> None:
    result = _inspect(networks, "Branching", "--json")
    assert result.exit_code == 2
    (operation,) = json.loads(result.stdout)["operations"]
    assert (operation["op"], operation["module"]) == ("if x.mean() > 0:", "body.1")
    assert operation["parameters"] == ["body.1.scale"]
    line = 1 + NETWORKS.splitlines().index("        if x.mean() > 0:")
    assert f"in module 'body.1' (networks.py, line {line}: `if x.mean() > 0:`)" in result.stderr
