"""Whose image a proxy is: against loops over images and channels, and handmade distances."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pleas
from pleas.errors import InputError
from pleas.statistics.domains import FOREIGN, Domains, answer_and_distance, look, shares_of, typical_distances
from tests.cases import conv_bn, plain_without_bn, pooled_head, randomise
from tests.merging import SETTINGS, images


def net(seed: int) -> nn.Module:
    module = nn.Sequential(conv_bn(3, 6), conv_bn(6, 8), pooled_head(8, 4)).eval()
    return randomise(module, torch.Generator().manual_seed(seed)).requires_grad_(False)


def domains(relative: Tensor, outputs: list[Tensor]) -> Domains:
    return Domains(relative, tuple(outputs), ("a", "b"))


def test_distance_is_that_of_every_channels_mean_in_the_image() -> None:
    network, x = net(1), images("residual", 5)
    with torch.no_grad():
        answer, found = answer_and_distance(network, x)
        assert torch.equal(answer, network(x))
        for i in range(len(x)):
            terms = []
            value = x[i : i + 1]
            for layer in (network[0], network[1]):  # type: ignore[index]
                conv, norm = layer[0], layer[1]
                inner = conv(value)
                own = [
                    (float(inner[0, c].mean()) - float(norm.running_mean[c])) ** 2
                    / (float(norm.running_var[c]) + norm.eps)
                    for c in range(inner.shape[1])
                ]
                terms.append(sum(own) / len(own))
                value = torch.relu(norm(inner))
            assert float(found[i]) == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_an_image_counts_for_the_parent_that_it_fits() -> None:
    distances = torch.tensor([[0.1, 2.0], [0.1, 2.0], [0.4, 0.2], [0.4, 0.2]])
    typical = typical_distances(distances)
    torch.testing.assert_close(typical, torch.tensor([0.1, 0.2]))
    shares = shares_of(distances, typical)
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    torch.testing.assert_close(shares[0], torch.tensor([100 / 101, 1 / 101]))  # ten times as far: (1 / 10)^2
    torch.testing.assert_close(shares[2], torch.tensor([1 / 17, 16 / 17]))
    torch.testing.assert_close(shares_of(typical[None], typical), torch.full((1, 2), 0.5))


def test_a_parent_is_contradicted_only_where_a_stranger_outvotes_it() -> None:
    near, far = torch.tensor([1.0, 2 * FOREIGN]), torch.tensor([2.0, 1.0])
    distances = torch.stack([far] * 8 + [near] * 8)
    right = torch.eye(3)[torch.arange(16) % 3]
    wrong = right.roll(1, 1)
    sure = torch.where(torch.arange(16)[:, None] < 8, right, 9 * wrong)
    found = domains(distances, [right, sure])
    assert [str(one) for one in found.contradictions] == [
        "parents contradict each other on each other's proxies: on those of a, b agrees with it on 0 % and the mean of "
        "the parents on 0 %, though they are 8 times as far from what b knows as its own"
    ]
    assert not domains(distances, [right, right]).contradictions  # far away, but of one mind
    assert not domains(distances, [right, sure / 18]).contradictions  # outvoted
    assert domains(distances, [right, right]).differ("separate")  # heads of their own only have to stay apart
    assert not domains(distances, [right, right]).differ("shared")
    closer = distances.clamp_max(FOREIGN)
    assert not domains(closer, [right, right]).differ("separate")
    assert not domains(closer, [right, sure]).contradictions  # its own domain: they differ as two opinions do


def test_without_batch_norm_nobody_can_tell() -> None:
    networks = [plain_without_bn().eval(), plain_without_bn().eval()]
    x = images("plain_without_bn", 8)
    assert look(networks, [(x, x)], ["a", "b"]) is None
    own = replace(SETTINGS, targets="own")
    with pytest.raises(InputError) as caught:
        pleas.merge(networks, list(images("plain_without_bn", 96).split(32)), budget=1.0, settings=own)
    assert str(caught.value) == (
        'targets = "own" reads from batch norms whose image a proxy is, and a parent has none: set it to "mean"'
    )
