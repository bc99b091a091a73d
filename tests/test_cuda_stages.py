"""Every stage on a pretended GPU: it runs there, gives the CPU's numbers, and does not wait for each of them."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import pleas
from datafree.artefact.load import load
from datafree.cli import main
from tests.cases import CASES, conv_bn, pooled_head, randomise
from tests.datafree.tiny import Tiny, make_tiny
from tests.pretend_cuda import pretend_cuda

GPU = torch.device("cuda")


@pytest.fixture
def waits() -> Iterator[Counter[str]]:
    with pretend_cuda() as counted:
        yield counted


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def _pair(name: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    images = torch.randn(24, *CASES[name].shape[1:], generator=torch.Generator().manual_seed(0))
    return CASES[name].model(0), CASES[name].model(1), list(images.split(8))


def test_the_mathematics_runs_there_and_gives_the_same_network(waits: Counter[str]) -> None:
    a, b, images = _pair("residual")
    here = pleas.merge(copy.deepcopy(a), copy.deepcopy(b), images, budget=1.5)
    there = [batch.to(GPU) for batch in images]
    parents = pleas.Parents.of([a.to(GPU), b.to(GPU)], there[0][:2])
    waits.clear()
    statistics = pleas.collect(parents, there)
    looked = {
        place: count for place, count in waits.items() if "Moments" not in place and "moments.py" not in place
    }
    assert sum(looked.values()) == len(there), f"one look a batch, to see that all is finite: {looked}"
    evidence = pleas.gather(parents, there, statistics=statistics)
    result = pleas.assemble(evidence, pleas.make_plan(evidence, budget=1.5))
    assert result.flops == here.flops
    with torch.no_grad():
        found, expected = result.module.to(GPU)(there[0]), here.module(images[0])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


class Positions(nn.Module):
    """Makes an index, a mask and a padding in its forward, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv_bn(3, 6), conv_bn(6, 8), pooled_head(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        place = torch.arange(y.shape[-1], device=y.device)
        mask = (place[:, None] - place[None]).abs() > 4
        y = y.masked_fill(mask, 0.0)[..., place.roll(2)] + torch.zeros(y.shape[-1], 1, device=y.device)
        return self.head(self.body(y))


def test_constants_made_on_the_way_go_where_the_network_goes(waits: Counter[str]) -> None:
    modules = [randomise(Positions().eval(), torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    images = list(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2)).split(8))
    traced = pleas.Parents.of(modules, images[0])  # on the CPU
    module = pleas.assemble(
        evidence := pleas.gather(traced, images), pleas.make_plan(evidence, budget=1.5)
    ).module
    with torch.no_grad():
        expected = module(images[0])
        found = module.to(GPU)(images[0].to(GPU))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


def _run(tiny: Tiny, command: str, out: Path | None, *settings: str, device: str = "cuda") -> str:
    place = ["-o", str(out)] if out is not None else []
    words = [word for setting in settings for word in ("--set", setting)]
    start = [command, str(tiny.recipe)] if command != "eval" else []
    result = CliRunner().invoke(main, [*start, *place, "--device", device, *words])
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    return result.stdout


SETTINGS = (
    "proxy.count=128",
    "proxy.sources=[{kind: inversion, steps: 2}]",
    "merge.budgets=[1.4]",
    "refine={steps: 4}",
)


def test_a_whole_run_with_inversion_and_refining(tiny: Tiny, tmp_path: Path) -> None:
    with pretend_cuda():
        _run(tiny, "merge", tmp_path / "there", *SETTINGS)
        told = _run(tiny, "diagnose", None, *SETTINGS[:2])
        evaluated = CliRunner().invoke(
            main, ["eval", str(tmp_path / "there"), str(tiny.recipe), "--device", "cuda", "--json"]
        )
        assert evaluated.exit_code == 0, evaluated.output
        module = load(tmp_path / "there").module.to(GPU)
        assert module(torch.zeros(1, 1, 8, 8, device=GPU)).is_cuda
    assert "inversion" in told
    _run(tiny, "merge", tmp_path / "here", *SETTINGS, device="cpu")
    there, here = (
        {
            row["name"]: row["average"]
            for row in json.loads((tmp_path / side / "metrics.json").read_text())["rows"]
        }
        for side in ("there", "here")
    )
    assert there.keys() == here.keys()
    assert there == pytest.approx(here, abs=0.15), "the same but for what rounding does to training"
    assert json.loads((tmp_path / "there" / "run.json").read_text())["device"] == "cuda"
