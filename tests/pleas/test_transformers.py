"""Merging networks that are not plain CNNs: vision transformers of `transformers`, windows, mixers, LayerNorm CNNs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import pleas
from pleas import MergeSettings, Parents
from pleas.symmetry import permute_state, random, state_of
from tests.cases import randomise
from tests.merging import difference, outputs

SETTINGS = MergeSettings(ridge=1e-6, positions=64, rows=1000, propagate=0.7)


def vit() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=3
    )


def swin() -> nn.Module:
    return timm.models.SwinTransformer(
        img_size=32,
        patch_size=2,
        num_classes=5,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 3),
        window_size=4,
    )


def mixer() -> nn.Module:
    return timm.models.MlpMixer(
        num_classes=5, img_size=16, patch_size=4, num_blocks=2, embed_dim=24, mlp_ratio=(0.5, 2.0)
    )


def gmixer() -> nn.Module:
    return timm.models.MlpMixer(
        num_classes=5,
        img_size=16,
        patch_size=4,
        num_blocks=2,
        embed_dim=24,
        mlp_ratio=(1.0, 2.0),
        mlp_layer=timm.layers.mlp.GluMlp,
        act_layer=nn.SiLU,
    )


def resmlp() -> nn.Module:
    blocks = timm.models.mlp_mixer
    return timm.models.MlpMixer(
        num_classes=5,
        img_size=16,
        patch_size=4,
        num_blocks=2,
        embed_dim=24,
        mlp_ratio=2,
        block_layer=blocks.ResBlock,
        norm_layer=blocks.Affine,
    )


def convnext() -> nn.Module:
    return timm.models.ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), patch_size=2)


def from_transformers(name: str) -> Callable[[], nn.Module]:
    """A classifier of `transformers` with a tiny configuration."""

    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
        common = {"image_size": 16, "patch_size": 4, "num_labels": 5}
        transformer = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
        chosen = {
            "ViT": common | transformer | {"intermediate_size": 40},
            "DeiT": common | transformer | {"intermediate_size": 40},
            "ConvNext": {
                "num_labels": 5,
                "depths": [1, 1, 1, 1],
                "hidden_sizes": [8, 12, 16, 20],
                "patch_size": 2,
            },
            "Swin": {
                "image_size": 32,
                "patch_size": 2,
                "num_labels": 5,
                "embed_dim": 12,
                "depths": [2, 2],
                "num_heads": [2, 3],
                "window_size": 4,
            },
        }[name]
        config = getattr(transformers, f"{name}Config")(**chosen)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # name -> (builder, pixels)
    "vit": (vit, 16),
    "swin": (swin, 32),
    "mixer": (mixer, 16),
    "gmixer": (gmixer, 16),
    "resmlp": (resmlp, 16),
    "convnext": (convnext, 32),
    "transformers ViT": (from_transformers("ViT"), 16),
    "transformers DeiT": (from_transformers("DeiT"), 16),
    "transformers ConvNext": (from_transformers("ConvNext"), 32),
    "transformers Swin": (from_transformers("Swin"), 32),
}


# Each once, widened; fused throughout only the plainest, which is what a permuted copy alone comes to.
MERGES = [(name, 2, 0.5) for name in MODELS] + [("vit", 2, 0.0), ("mixer", 2, 0.0), ("vit", 3, 0.5)]
SLOW = {("swin", 3, 0.5), ("vit", 3, 0.0), *((name, 2, 0.0) for name in MODELS)} - {*MERGES}


@pytest.mark.parametrize(
    ("name", "count", "apart"),
    [*MERGES, *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(SLOW))],
)
def test_merging_permuted_copies_gives_the_model_back(name: str, count: int, apart: float) -> None:
    """At 1.0x and widened: logits within 1e-3 of their scale."""
    build, size = MODELS[name]
    a = randomise(build().eval(), torch.Generator().manual_seed(0))
    images = torch.randn(48, 3, size, size, generator=torch.Generator().manual_seed(5))
    symmetry = pleas.trace(a, images[:2])
    state, copies, expected = state_of(symmetry.program, a), [], outputs(a, images[:8])
    for seed in range(3, 2 + count):
        permuted = permute_state(symmetry, state, random(symmetry, torch.Generator().manual_seed(seed)))
        copies.append(copy.deepcopy(a))
        copies[-1].load_state_dict({key: permuted.get(key, value) for key, value in a.state_dict().items()})
        assert difference(outputs(copies[-1], images[:8]), expected) < 1e-3
    networks = Parents.of([a, *copies], images[:2], SETTINGS, symmetry=symmetry)
    evidence = pleas.gather(networks, list(images.split(24)))
    result = pleas.assemble(evidence, pleas.make_plan(evidence, apart=apart))
    assert difference(outputs(result.module, images[:8]), expected) < 1e-3
    assert apart == 0.0 or result.ratio > 1.0


@pytest.mark.parametrize(("name", "count"), [("vit", 2), ("vit", 3), ("swin", 2), ("convnext", 2)])
def test_strangers_merge_at_every_width(name: str, count: int) -> None:
    """Strangers too: the FLOPs are the predicted ones, every error is known, and everything apart is the ensemble."""
    build, size = MODELS[name]
    built = [randomise(build().eval(), torch.Generator().manual_seed(seed)) for seed in range(count)]
    images = torch.randn(48, 3, size, size, generator=torch.Generator().manual_seed(5))
    evidence = pleas.gather(Parents.of(built, images[:2], SETTINGS), list(images.split(24)))
    results = [pleas.assemble(evidence, pleas.make_plan(evidence, apart=share)) for share in (0.0, 1.0)]
    for result in results:
        assert result.held_out_error is not None
        assert 0 < result.held_out_error < float("inf")
        assert result.flops == result.plan.flops
    assert 1 == results[0].ratio < results[1].ratio == count
    ensemble = outputs(pleas.Ensemble(*built), images[:8])
    assert difference(outputs(results[1].module, images[:8]), ensemble) < 1e-4


@pytest.mark.parametrize(("name", "dtype"), [("vit", torch.float64), ("swin", torch.bfloat16)])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    build, size = MODELS[name]
    a = randomise(build().eval(), torch.Generator().manual_seed(0)).to(dtype)
    images = torch.randn(48, 3, size, size, generator=torch.Generator().manual_seed(5)).to(dtype)
    result = pleas.merge([a, a], list(images.split(24)), apart=0.5, settings=SETTINGS)
    assert {p.dtype for p in result.module.parameters()} == {dtype}
    error = difference(outputs(result.module, images[:8]), outputs(a, images[:8]))
    assert error < (1e-8 if dtype == torch.float64 else 0.2)
