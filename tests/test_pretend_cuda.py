"""The pretended GPU keeps CUDA's rule and the CPU's numbers; tracing runs on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pleas.guards import check_forwards
from pleas.symmetry import execute, export_program, plain, state_of, trace
from pleas.symmetry.batch import USUAL, batch_places
from tests.cases import CASES, conv_bn, pooled_head, randomise
from tests.pretend_cuda import Elsewhere, pretend_cuda


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with pretend_cuda():
        yield torch.device("cuda")


def test_tensors_go_there_and_come_back(gpu: torch.device) -> None:
    here = torch.arange(6.0).reshape(2, 3)
    there = here.to(gpu)
    assert isinstance(there, Elsewhere)
    assert str(there.device) == "cuda:0"
    assert (there @ there.T).is_cuda
    assert torch.equal((there @ there.T).cpu(), here @ here.T)
    assert torch.equal(there.to("cpu", torch.float64), here.double())
    assert there.double().is_cuda
    assert (there + torch.tensor(1.0)).is_cuda
    assert torch.zeros(3, device=gpu).is_cuda
    there.add_(1)
    assert torch.equal(there.cpu(), here + 1)
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        there.numpy()


def test_devices_do_not_mix(gpu: torch.device) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.add(torch.ones(3, device=gpu), torch.ones(3))
    network = nn.Linear(3, 2).to(gpu)
    assert all(p.is_cuda for p in network.parameters())
    with pytest.raises(RuntimeError, match="found at least two devices"):
        network(torch.ones(1, 3))
    assert copy.deepcopy(network)(torch.ones(1, 3, device=gpu)).is_cuda


class MakesConstants(nn.Module):
    """A mask, an index and a padding made in the forward, one of them of the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 6), pooled_head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mask = torch.zeros(x.shape[0], 16, 16, device=x.device, dtype=torch.bool)
        place = torch.arange(16, device=x.device)
        x = x[:, :, place.flip(0)] * place.to(x.dtype).view(1, 1, 1, 16).cos()
        return self.head(x.masked_fill(mask[:, None], 1.0) + torch.ones(16, 1, device=x.device))


@pytest.mark.parametrize("name", ["residual", "option_a", "plain", "constants"])
def test_tracing_runs_on_a_gpu(name: str, gpu: torch.device) -> None:
    build = CASES[name].build if name in CASES else MakesConstants
    shape = CASES[name].shape if name in CASES else (2, 3, 16, 16)
    model = randomise(build().eval(), torch.Generator().manual_seed(0))
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, own = model(images), trace(model, images)
    there = copy.deepcopy(model).to(gpu)
    for example in (images, images.to(gpu)):  # images on the CPU are moved
        symmetry = trace(there, example)
        assert symmetry.gate_error < 1e-9
        assert symmetry.permutable_share() == own.permutable_share()
        assert [cls.size for cls in symmetry.classes] == [cls.size for cls in own.classes]
    for program in (symmetry.program, own.program):  # also a program of the CPU
        state = state_of(program, there)
        assert all(tensor.is_cuda for tensor in state.values())
        found = execute(program.graph, [state], [images.to(gpu)])[0]
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
        assert check_forwards(program, [there, there], images) == ()
    found = execute(symmetry.program.graph, [state_of(symmetry.program, model)], [images])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert set(batch_places(own.program, there, images).values()) == {USUAL}
    assert all(p.is_cuda for p in there.parameters())


def test_no_device_is_written_into_a_graph() -> None:
    model, images = MakesConstants().eval(), torch.randn(2, 3, 16, 16)
    program = export_program(model, images)
    assert not [node for node in program.graph.nodes if node.kwargs.get("device") is not None]
    assert program.batch is None
    found = execute(program.graph, [state_of(program, model)], [images.repeat(3, 1, 1, 1)])[0]
    torch.testing.assert_close(found, model(images.repeat(3, 1, 1, 1)), rtol=1e-4, atol=1e-5)


def test_folding_runs_on_a_gpu(gpu: torch.device) -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), pooled_head(4)
    )
    assert all(p.is_cuda for p in plain(model.to(gpu)).parameters())
