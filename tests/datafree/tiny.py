"""A whole merge in a second: two small untrained networks, noise for proxies, a few digits to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from datafree.recipe.file import RecipeFile, load_recipe
from datafree.references.registry import build_model

NETWORK = '''\
"""A small residual network with batch norm, as a user would write it."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, width=6, num_classes=10):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block = Block(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.block(torch.relu(self.bn(self.stem(x)))).mean((2, 3)))


def net(width=6, num_classes=10):
    return Net(width, num_classes)
'''

RECIPE = """\
name: tiny
parents:
  a: {model: "python:net.py:net", weights: a.safetensors, preprocess: {size: 8, mean: [0.3], std: [0.4]}}
  b: {model: "python:net.py:net", weights: b.safetensors, preprocess: {size: 8, mean: [0.3], std: [0.4]}}
proxy:
  count: 64
  sources:
    - {kind: noise}
merge: {budgets: [1.0, 1.4], positions: 16}
evaluate:
  - {name: upright, images: {digits: {domain: upright}, limit: 40}}
  - {name: rotated, images: {digits: {domain: rotated}, limit: 40}}
"""


@dataclass(frozen=True)
class Tiny:
    """A folder with a recipe, its network's code and both parents' weights."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.yaml"

    def load(self, *overrides: str) -> RecipeFile:
        return load_recipe(self.recipe, overrides)

    def network(self, **arguments: int) -> nn.Module:
        """A fresh network of the parents' class."""
        return build_model("python:net.py:net", arguments, self.folder)

    def write_parent(self, name: str, seed: int, **arguments: int) -> Path:
        """Weights as training would leave them: batch norms with statistics of their own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.network(**arguments).train()
            for _ in range(20):
                model(torch.randn(32, 1, 8, 8))
        path = self.folder / f"{name}.safetensors"
        save_file(model.state_dict(), path)
        return path


def make_tiny(folder: Path) -> Tiny:
    tiny = Tiny(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NETWORK)
    tiny.recipe.write_text(RECIPE)
    tiny.write_parent("a", 1)
    tiny.write_parent("b", 2)
    return tiny
