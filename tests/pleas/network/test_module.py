"""The merged module: layers in blocks, and a description in plain data that cannot name code to run."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import pleas
from pleas.errors import InputError
from pleas.network.module import BlockLayer, MergedNetwork, flops, graph_from_data, module_from_config
from tests.merging import evidence_of, images, outputs, parents


def merged(count: int = 2) -> MergedNetwork:
    evidence = evidence_of("residual", parents("residual", count))
    plan = pleas.make_plan(evidence, apart=0.5)
    module = pleas.assemble(evidence, plan, least_squares=False).module
    assert isinstance(module, MergedNetwork)
    return module


def block(**changes: Any) -> BlockLayer:
    given: dict[str, Any] = {
        "kernel": (3, 3), "reads": [{"slice": [0, 2]}, {"index": [0, 3]}, {"slice": [0, 4]}], "widths": [2, 2, 4],
        "rows": [2, 1, 3], "units": 4, "order": [5, 0, 1, 2, 3, 4], "bias": True,
        "geometry": {"stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "groups": 1},
    }  # fmt: skip
    layer = BlockLayer(**(given | changes))
    torch.manual_seed(0)
    for p in layer.parameters():
        p.data = torch.randn(p.shape)
    return layer


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_blocks_are_a_dense_convolution_with_zeros(kernel: int, stride: int) -> None:
    """Also where single pixels are subsampled, which runs another kernel."""
    padding = kernel // 2
    geometry = {"stride": [stride] * 2, "padding": [padding] * 2, "dilation": [1, 1], "groups": 1}
    layer = block(kernel=(kernel, kernel), geometry=geometry)
    assert layer.subsamples == (kernel == 1 and stride == 2)
    dense = torch.zeros(6, 4, kernel, kernel)
    dense[0:2, 0:2], dense[2:3, [0, 3]], dense[3:6] = layer.weight_0, layer.weight_1, layer.weight_2  # type: ignore[assignment]
    x = torch.randn(2, 4, 7, 7)
    expected = nn.functional.conv2d(x, dense, layer.bias, stride, padding)[:, layer.order]  # type: ignore[arg-type,index]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_a_linear_layer_run_over_the_last_dimension() -> None:
    layer = block(kernel=(), geometry=None, order=None, bias=False)
    dense = torch.zeros(6, 4)
    dense[0:2, 0:2], dense[2:3, [0, 3]], dense[3:6] = layer.weight_0, layer.weight_1, layer.weight_2  # type: ignore[assignment]
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(x), x @ dense.T, rtol=1e-4, atol=1e-5)
    assert layer.bias is None


@pytest.mark.parametrize("count", [2, 3])
def test_a_description_survives_json(count: int) -> None:
    module = merged(count)
    config = pleas.program_config(module)
    again = module_from_config(json.loads(json.dumps(config)))
    again.load_state_dict(module.state_dict())
    x = images("residual", 4)
    assert torch.equal(outputs(again, x), outputs(module, x))
    assert again.head_sizes == module.head_sizes == (5,)
    assert pleas.program_config(again) == config
    assert pleas.program_config(parents("residual")[0]) is None


def test_a_copy_shares_nothing_and_keeps_what_can_be_trained() -> None:
    module = merged()
    next(module.parameters()).requires_grad_(False)
    module.train()
    copied = copy.deepcopy(module)
    assert copied.training
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in module.parameters()]
    for p in copied.parameters():
        p.data.zero_()
    assert all(float(p.abs().sum()) > 0 for p in module.parameters() if p.dim() > 1)
    assert copy.deepcopy(module.double()).eval()(images("residual", 2).double()).dtype == torch.float64


@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "aten.nothing_like_this.default", "builtins.eval"]
)
def test_a_description_cannot_name_code_to_run(target: str) -> None:
    node = {"name": "x", "op": "call_function", "target": target, "args": ["true"], "kwargs": {}}
    with pytest.raises(
        InputError, match=rf"module config calls '{target}': only aten ops and plain operators"
    ):
        graph_from_data([node])


def test_another_format_is_refused() -> None:
    with pytest.raises(InputError, match="module config has format 99, this version reads format 1"):
        module_from_config({"format": 99})


def test_flops_are_counted_without_running_or_changing_anything() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)).train()
    before = copy.deepcopy(net.state_dict())
    assert flops(net, torch.zeros(7, 3, 8, 8)) == 2 * 36 * 4 * 27 + 2 * 4 * 36 * 5  # of one image
    assert net.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
