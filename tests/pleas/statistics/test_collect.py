"""One pass over the proxies: shards add up, batches do not matter, every site is the modules' own activations."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pleas
from pleas import MergeSettings, Parents, Statistics
from pleas.errors import InputError, NonFinite
from pleas.statistics.collect import count_images, for_each
from tests.cases import CASES, randomise
from tests.merging import NAMES, images, parents, traced

FIVE = MergeSettings(positions=5)
EVERY = MergeSettings(positions=1000, rows=10**6)


def made(name: str, count: int = 2, settings: MergeSettings = FIVE) -> Parents:
    return Parents.of(parents(name, count), CASES[name].example(), settings, symmetry=traced(name))


def assert_same(first: Statistics, second: Statistics) -> None:
    assert first.images == second.images
    assert first.units.keys() == second.units.keys()
    for site, moments in first.units.items():
        assert moments.count == second.units[site].count
        torch.testing.assert_close(moments.covariance, second.units[site].covariance, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.mean, second.units[site].mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in NAMES), ("residual", 3)])
def test_shards_add_up_and_batches_do_not_matter(name: str, count: int) -> None:
    """Two shards summed are the whole, in any order, whatever the batch size."""
    networks, x = made(name, count), images(name, 40)
    whole = pleas.collect(networks, list(x.split(8)))
    first = pleas.collect(networks, list(x[:24].split(5)), images=40)
    second = pleas.collect(networks, list(x[24:].split(16)), first_image=24, images=40)
    assert_same(first + second, whole)
    assert_same(second + first, whole)
    tensors = whole.to_tensors()
    for key, tensor in Statistics.from_tensors(tensors).to_tensors().items():
        assert torch.equal(tensor, tensors[key])


def test_inputs_and_outputs_of_every_layer_are_read() -> None:
    networks = made("pre_activation")
    sites = set(pleas.collect(networks, [images("pre_activation", 8)]).units)
    layers = {(layer.weight, dim) for layer in networks.layers for dim in (0, 1)}
    assert layers <= sites
    # Batch norms that stand alone are read as what they normalise.
    assert {name for name, _ in sites - layers} == {
        "1.bn1.running_mean",
        "2.bn1.running_mean",
        "3.running_mean",
    }


@pytest.mark.parametrize("count", [2, 3])
def test_moments_are_those_of_the_modules_own_activations(count: int) -> None:
    """Parents side by side, each in its own order, at every position of every image; batch norm included."""
    networks, x = made("residual", count, EVERY), images("residual", 12)
    statistics = pleas.collect(networks, list(x.split(5)))
    layer = next(layer for layer in networks.layers if layer.norm is not None)
    conv, norm = layer.name, layer.norm.name  # type: ignore[union-attr]
    for module_name, reads, site in ((conv, True, (layer.weight, 1)), (norm, False, (layer.weight, 0))):
        values = [_seen(module, module_name, x, reads) for module in networks.modules]
        rows = torch.cat([v.movedim(1, -1).flatten(0, -2) for v in values], 1).double()
        moments = statistics.units[site]
        assert moments.count == len(rows)
        torch.testing.assert_close(moments.mean[0], rows.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.covariance[0], rows.T.cov(correction=0), rtol=1e-4, atol=1e-5)


def _seen(model: nn.Module, name: str, x: Tensor, reads: bool) -> Tensor:
    found: list[Tensor] = []
    module = copy.deepcopy(model)
    module.get_submodule(name).register_forward_hook(
        lambda _, args, output: found.append((args[0] if reads else output).clone())
    )
    with torch.no_grad():
        module(x)
    return found[0]


class TokensFirst(nn.Module):
    """A linear map on (tokens, N, channels), as `nn.MultiheadAttention` without batch_first has it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        return self.head(torch.relu(self.mix(x)).mean(0))


def test_tokens_may_come_first() -> None:
    models = [randomise(TokensFirst().eval(), torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    x = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    networks = Parents.of(models, x[:2], FIVE)
    whole = pleas.collect(networks, [x])
    assert whole.units["mix.weight", 1].count == 5 * 20
    first = pleas.collect(networks, list(x[:12].split(5)), images=20)
    assert_same(first + pleas.collect(networks, [x[12:]], first_image=12, images=20), whole)
    every = pleas.collect(Parents.of(models, x[:2], EVERY), list(x.split(7)))
    rows = torch.cat([_seen(m, "mix", x, True).flatten(0, 1) for m in models], 1).double()
    torch.testing.assert_close(
        every.units["mix.weight", 1].covariance[0], rows.T.cov(correction=0), rtol=1e-4, atol=1e-5
    )


def test_windows_stand_in_the_batch_dimension() -> None:
    """Four windows of an image: as many rows from all of them as one map gives."""
    swin = timm.models.SwinTransformer(
        img_size=16, patch_size=2, num_classes=5, embed_dim=12, depths=(2,), num_heads=(2,), window_size=4
    )
    models = [randomise(copy.deepcopy(swin).eval(), torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    x = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    networks = Parents.of(models, x[:2], MergeSettings(positions=8))
    whole = pleas.collect(networks, [x])
    name = next(layer.weight for layer in networks.layers if "qkv" in layer.name)
    assert whole.units[name, 1].count == 10 * 8
    first = pleas.collect(networks, list(x[:6].split(4)), images=10)
    assert_same(first + pleas.collect(networks, [x[6:]], first_image=6, images=10), whole)


def test_parents_may_see_images_of_their_own() -> None:
    """One batch per parent, in order; a DataLoader gives lists where a list of batches has tuples."""
    networks, x = made("residual"), images("residual", 16)
    both = pleas.collect(networks, [(part, part) for part in x.split(8)])
    assert_same(both, pleas.collect(networks, list(x.split(8))))
    loaded = pleas.collect(networks, DataLoader(list(x), batch_size=8))  # type: ignore[arg-type]
    assert loaded.images == 16
    pairs = pleas.collect(networks, DataLoader([(one, 2 * one) for one in x], batch_size=8))  # type: ignore[arg-type]
    size = networks.layers[0].channels
    covariance = pairs.units[networks.layers[0].weight, 1].covariance[0]
    torch.testing.assert_close(covariance[size:, size:], 4 * covariance[:size, :size], rtol=1e-4, atol=1e-5)


def test_bad_batches_say_what_they_hold() -> None:
    networks, x = made("residual"), images("residual", 4)
    labels = torch.zeros(3, dtype=torch.int64)
    for batch, held in (
        ((x, labels), r"\[\(4, 3, 16, 16\), \(3,\)\]"),
        ((x, x, x), r"\[\(4, 3, 16, 16\), \(4, 3, 16, 16\), \(4, 3, 16, 16\)\]"),
        ((x, "cat"), r"\[\(4, 3, 16, 16\), 'str'\]"),
        ([x], r"\[\(4, 3, 16, 16\)\]"),
    ):
        with pytest.raises(
            InputError, match=f"a batch holds {held}, and there are 2 parents: give one tensor"
        ):
            pleas.collect(networks, [batch])  # type: ignore[list-item]


def test_no_images_are_refused() -> None:
    with pytest.raises(InputError, match="no proxy images: the statistics need at least one batch"):
        pleas.collect(made("residual"), [])


def test_activations_that_are_not_finite_name_parent_and_layer() -> None:
    with pytest.raises(
        NonFinite, match=r"parent a: the input of layer '0\.0' is NaN or infinite on the proxy"
    ):
        pleas.collect(made("residual"), [images("residual", 4) * float("nan")])


def test_statistics_of_other_models_do_not_add() -> None:
    first, second = (pleas.collect(made(name), [images(name, 4)]) for name in ("residual", "grouped"))
    with pytest.raises(InputError, match="statistics of different models cannot be added"):
        _ = first + second


def test_one_shot_iterators_are_refused_before_any_work() -> None:
    with pytest.raises(InputError, match="one-shot iterator; give a list of batches or a DataLoader"):
        pleas.gather(made("residual"), iter([images("residual", 4)]))


def test_statistics_that_the_caller_has_are_used() -> None:
    networks, x = made("residual"), images("residual", 32)
    statistics = pleas.collect(networks, [x])
    evidence = pleas.gather(networks, [x], statistics=statistics)
    assert evidence.statistics is statistics


def test_images_are_counted_where_the_batches_are_at_hand() -> None:
    x = images("residual", 10)
    assert count_images(list(x.split(4))) == 10
    assert count_images([(part, part) for part in x.split(4)]) == 10
    assert count_images(DataLoader(list(x))) is None  # type: ignore[arg-type]
    assert for_each(x, made("residual", 3)) == [x] * 3


def test_progress_is_told_batch_by_batch() -> None:
    said: list[tuple[str, int, int]] = []
    pleas.collect(made("residual"), list(images("residual", 8).split(4)), progress=lambda *x: said.append(x))
    assert said == [("statistics", 1, 2), ("statistics", 2, 2)]


@pytest.mark.parametrize("outputs", [3, 4])
def test_heads_of_unequal_size_are_not_read_and_matching_goes_on(outputs: int) -> None:
    """5 and 4 outputs do not part into two halves, 5 and 3 into the wrong ones."""
    small = CASES["residual"].model(3)
    head = small[-1]  # type: ignore[index]
    assert isinstance(head, nn.Sequential)
    head[-1] = nn.Linear(8, outputs)
    settings = MergeSettings(heads="separate")
    networks = Parents.of([*parents("residual"), small], CASES["residual"].example(), settings)
    statistics = pleas.collect(networks, [images("residual", 16)])
    weight = networks.layers[-1].weight
    assert (weight, 1) in statistics.units
    assert (weight, 0) not in statistics.units
    assert len(pleas.match(networks, statistics)) == 3
