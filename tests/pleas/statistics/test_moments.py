from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pleas.layers.layer import Layer, flatten_weight, layer_rows, unflatten_weight
from pleas.statistics.moments import Moments, symmetric
from tests.reference import covariance_by_loop, rows_by_unfold


def moments_of(*batches: torch.Tensor) -> Moments:
    moments = Moments.starting_at(batches[0][None])
    for batch in batches:
        moments.add(batch[None])
    return moments


def test_streamed_moments_equal_a_loop_over_rows() -> None:
    rows = torch.randn(50, 6, dtype=torch.float64) * 3 + 5
    moments = moments_of(*rows.split(7))
    mean, covariance = covariance_by_loop(rows)
    torch.testing.assert_close(moments.mean[0], mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.covariance[0], covariance, rtol=1e-12, atol=1e-12)


def test_float32_rows_far_from_the_origin_keep_their_covariance() -> None:
    """Why there is a shift: without it a mean of 1,000 leaves no digits for a variance of 1."""
    rows = torch.randn(4000, 3) + 1000
    _, covariance = covariance_by_loop(rows)
    torch.testing.assert_close(moments_of(*rows.split(64)).covariance[0], covariance, rtol=1e-5, atol=1e-5)


def test_shards_add_up_and_order_does_not_matter() -> None:
    rows = torch.randn(60, 4, dtype=torch.float64) + torch.arange(4)
    whole = moments_of(*rows.split(10))
    first, second = moments_of(*rows[:20].split(5)), moments_of(rows[20:])
    for total in (first + second, second + first):
        assert total.count == whole.count
        torch.testing.assert_close(total.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


def convolution(
    channels: int, out: int, kernel: int, stride: int, padding: int, groups: int = 1, dilation: int = 1
) -> Layer:
    return Layer(
        "conv", ("conv",), "conv.weight", None, kernel * kernel, channels, out, groups,
        (kernel, kernel), (stride, stride), (padding, padding), (dilation, dilation),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (1, 2, 0, 1), (5, 1, 2, 1), (3, 1, 2, 2)],
)
def test_rows_are_the_unfolded_input(kernel: int, stride: int, padding: int, dilation: int) -> None:
    x = torch.randn(3, 4, 9, 7)
    layer = convolution(4, 5, kernel, stride, padding, dilation=dilation)
    expected = rows_by_unfold(x, (kernel, kernel), stride, padding, dilation)
    assert torch.equal(layer_rows(layer, x, None)[0], expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_times_canonical_weight_is_the_convolution(groups: int) -> None:
    x, weight = torch.randn(2, 4, 6, 6).double(), torch.randn(8, 4 // groups, 3, 3).double()
    layer = convolution(4, 8, 3, 2, 1, groups)
    rows = layer_rows(layer, x, None)
    matrix = flatten_weight(weight).unflatten(0, (groups, -1))
    computed = (rows @ matrix.mT).permute(1, 0, 2).reshape(2, 3, 3, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(computed, F.conv2d(x, weight, None, 2, 1, 1, groups), rtol=1e-12, atol=1e-12)
    assert torch.equal(unflatten_weight(flatten_weight(weight), (3, 3)), weight)


def test_sampled_positions_are_rows_of_the_whole() -> None:
    x = torch.randn(6, 2, 8, 8)
    layer = convolution(2, 3, 3, 1, 1)
    positions = torch.rand((6, 64)).argsort(1)[:, :5]
    rows = layer_rows(layer, x, None)[0].view(6, 64, -1)
    assert torch.equal(
        layer_rows(layer, x, positions)[0].view(6, 5, -1),
        rows.gather(1, positions[:, :, None].expand(-1, -1, 18)),
    )


def test_wide_rows_are_summed_in_strips() -> None:
    """Only the upper triangle of the sums counts; the covariance is whole."""
    rows = torch.randn(40, 450, dtype=torch.float64)
    covariance = moments_of(*rows.split(16)).covariance[0]
    torch.testing.assert_close(covariance, rows.T.cov(correction=0), rtol=1e-10, atol=1e-12)
    assert torch.equal(covariance, covariance.T)
    upper = torch.tensor([[1.0, 2.0], [7.0, 3.0]])
    assert symmetric(upper).tolist() == [[1, 2], [2, 3]]
