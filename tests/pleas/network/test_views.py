"""Norms and means over widened units, against a loop over units and owners."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
from torch import Tensor, fx, nn

import pleas
from pleas import Evidence, MergeSettings, Parents
from pleas.network.module import module_from_config, program_config
from pleas.network.views import Constants, normalised_by_owner, views_of
from pleas.network.widen import Layouts
from pleas.plan.layout import ClassPlan, Layout, lay_out, owners
from pleas.symmetry import DimUnits
from pleas.symmetry.owners import reduced_over
from tests.cases import randomise
from tests.merging import difference, outputs

SETTINGS = MergeSettings(ridge=1e-6, positions=64, rows=1000, propagate=0.7)


def layout() -> Layout:
    """Five units of three parents, two positions each, and a fixed position at the end."""
    plan = ClassPlan.of([[7], [1, 2, 4], [3, 4], [7], [5, 2]], 3)
    cls = torch.tensor([0] * 10 + [-1])
    unit = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, -1])
    return lay_out(DimUnits(cls, unit), {0: plan}, 3)


def test_every_view_has_each_position_of_the_parents_axis_once() -> None:
    axis = layout()
    for parent, view in enumerate(views_of(axis)):
        assert sorted(axis.sources[parent][view.reads].tolist()) == list(range(11))
        own = [i for i, mask in enumerate(axis.masks.tolist()) if parent in owners(mask)]
        assert view.reads.tolist() == own
        assert all(own[int(view.back[i])] == i for i in own)
    assert torch.allclose(sum(view.share for view in views_of(axis)), torch.ones(axis.size).double())  # type: ignore[arg-type]


def test_a_norm_is_taken_of_every_view_and_averaged_over_owners() -> None:
    axis = layout()
    x = torch.randn(2, 3, axis.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = normalised_by_owner(x, axis, lambda v: (v - v.mean(-1, True)) / v.std(-1, keepdim=True))
    for unit, mask in enumerate(axis.masks.tolist()):
        own = []
        for parent in owners(mask):
            view = x[..., [i for i, m in enumerate(axis.masks.tolist()) if m >> parent & 1]]
            own.append((x[..., unit] - view.mean(-1)) / view.std(-1))
        assert torch.allclose(found[..., unit], sum(own) / len(own), atol=1e-12)  # type: ignore[arg-type]


def test_equal_constants_have_one_name_that_no_tensor_has() -> None:
    graph, constants = fx.Graph(), Constants(["owners.weight", "head.bias"])
    names = [
        str(constants.add(graph, "view", torch.tensor(value)).target) for value in ([1, 2], [1, 3], [1, 2])
    ]
    assert names == ["owners_.view_0", "owners_.view_1", "owners_.view_0"]


class Pooled(nn.Module):
    """A group norm of one group, and a mean over channels that meets them again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 4, 4), nn.GroupNorm(1, 12)
        self.rise, self.fall, self.head = nn.Conv2d(12, 20, 1), nn.Conv2d(20, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.rise(self.norm(x)))
        x = x + self.fall(y / (1 + y.square().mean(1, keepdim=True).sqrt()))
        return self.head(x.mean((2, 3)))


class Gathered(nn.Module):
    """A mean over channels that becomes a channel itself, and one that meets channels in another order."""

    def __init__(self, flipped: bool) -> None:
        super().__init__()
        self.stem, self.head, self.flipped = nn.Conv2d(3, 12, 4, 4), nn.Linear(13 - flipped, 5), flipped
        self.other = nn.Conv2d(3, 12, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        mean = y.mean(1, keepdim=True)
        y = mean * self.other(x) if self.flipped else torch.cat([y, mean], 1)
        return self.head(y.mean((2, 3)))


def rms() -> nn.Module:
    """A transformer with RMS norms, which are exported as arithmetic."""
    sizes = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 1, "num_heads": 3}
    return timm.models.VisionTransformer(**sizes, norm_layer=timm.layers.RmsNorm)  # type: ignore[arg-type]


def grn() -> nn.Module:
    """Layer norms over channels, and global response norms."""
    return timm.models.ConvNeXt(
        num_classes=5,
        depths=(0, 1, 0, 1),
        dims=(8, 8, 12, 12),
        patch_size=2,
        use_grn=True,
        ls_init_value=None,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"pooled": Pooled, "rms": rms, "grn": grn}


@cache
def evidence(name: str, count: int) -> tuple[Evidence, Tensor]:
    built = [randomise(MODELS[name]().eval(), torch.Generator().manual_seed(seed)) for seed in range(count)]
    side = 32 if name == "grn" else 16
    x = torch.randn(48, 3, side, side, generator=torch.Generator().manual_seed(5))
    return pleas.gather(Parents.of(built, x[:2], SETTINGS), list(x.split(24))), x


@pytest.mark.parametrize(("name", "count"), [("pooled", 2), ("pooled", 3), ("rms", 2), ("grn", 2)])
def test_everything_apart_is_the_ensemble(name: str, count: int) -> None:
    found, x = evidence(name, count)
    parents = found.parents
    assert all(c.widenable or c.kind == "output" for c in parents.symmetry.classes)
    result = pleas.assemble(found, pleas.make_plan(found, budget=float(count)), least_squares=False)
    assert result.ratio == count
    assert difference(outputs(result.module, x), outputs(pleas.Ensemble(*parents.modules), x)) < 1e-4


def test_a_stream_comes_apart_when_everything_else_has() -> None:
    found, _ = evidence("rms", 2)
    symmetry = found.parents.symmetry
    (stream,) = reduced_over(symmetry)
    assert stream == int(symmetry.axis("cls_token", 2).cls[0])
    half, whole = (pleas.make_plan(found, budget=budget) for budget in (1.5, 2.0))
    assert not half.classes[stream].widened
    assert half.ratio > 1.45
    assert all(p.width == 2 * p.size for c, p in whole.classes.items() if c not in symmetry.output)


def test_what_is_saved_comes_back_with_the_same_bits() -> None:
    found, x = evidence("pooled", 2)
    module = pleas.assemble(found, pleas.make_plan(found, apart=0.5), least_squares=False).module
    config = program_config(module)
    assert config is not None
    again = module_from_config(config)
    again.load_state_dict(module.state_dict())
    assert torch.equal(outputs(again, x), outputs(module, x))
    assert any(name.startswith("owners.") for name in module.state_dict())


@pytest.mark.parametrize(("flipped", "reason"), [(False, "mean runs over it"), (True, "of another order")])
def test_numbers_that_do_not_meet_their_units_again_keep_them_fused(flipped: bool, reason: str) -> None:
    symmetry = pleas.trace(Gathered(flipped).eval(), torch.randn(2, 3, 16, 16))
    units = symmetry.classes[int(symmetry.axis("stem.weight", 0).cls[0])]
    assert not units.widenable
    assert reason in units.reason


def test_layouts_of_a_view_of_fused_units_are_the_parents_own() -> None:
    symmetry = pleas.trace(Pooled().eval(), torch.randn(2, 3, 16, 16))
    axis = Layouts(symmetry, {}, 2).axis("stem.weight", 0)
    x = torch.randn(2, 12)
    assert torch.equal(normalised_by_owner(x, axis, torch.sigmoid), torch.sigmoid(x))
