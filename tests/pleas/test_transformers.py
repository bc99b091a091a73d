"""Merging networks that are not plain CNNs: vision transformers of `transformers`, windows, mixers, LayerNorm CNNs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import pleas
from pleas import MergeSettings
from pleas.symmetry import logits_of, permute_state, random, state_of
from tests.cases import randomise

SETTINGS = MergeSettings(ridge=1e-6, positions=256, rows=1000)


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


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits = logits_of(module(x))
    assert logits is not None
    return logits


@pytest.mark.parametrize("apart", [0.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_merging_a_permuted_copy_gives_the_model_back(name: str, apart: float) -> None:
    """Invariant 2, at 1.0x and widened: logits within 1e-3 of their scale."""
    build, size = MODELS[name]
    a = randomise(build().eval(), torch.Generator().manual_seed(0))
    images = torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(5))
    symmetry = pleas.trace(a, images[:2])
    b = copy.deepcopy(a)
    permuted = permute_state(
        symmetry, state_of(symmetry.program, a), random(symmetry, torch.Generator().manual_seed(3))
    )
    b.load_state_dict({key: permuted.get(key, value) for key, value in b.state_dict().items()})
    expected = outputs(a, images[:8])
    assert float((outputs(b, images[:8]) - expected).abs().max() / expected.abs().max()) < 1e-3
    batches = list(images.split(32))
    statistics = pleas.collect(symmetry, a, b, batches, SETTINGS)
    matching = pleas.match(symmetry, statistics, a, b, SETTINGS)
    statistics = pleas.collect_grouped(symmetry, statistics, matching, a, b, batches, SETTINGS)
    plan = pleas.make_plan(symmetry, statistics, matching, a, b, SETTINGS, apart=apart)
    result = pleas.assemble(symmetry, statistics, matching, plan, a, b, SETTINGS, example=images[:2])
    error = (outputs(result.module, images[:8]) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-3
    assert apart == 0.0 or result.ratio > 1.0
