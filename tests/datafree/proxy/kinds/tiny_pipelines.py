"""Random diffusers pipelines of three families, a few hundred kilobytes each, built without a network.

Also the callables that tests name as `pipeline: python:...`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def build(family: str, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        {"unconditional": unconditional, "class": class_conditional, "text": text_to_image}[
            family
        ]().save_pretrained(folder)
    return folder


def unconditional(channels: int = 3) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    unet = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=1000))


def class_conditional() -> Any:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    transformer = DiTTransformer2DModel(
        sample_size=4,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
    )
    scheduler: Any = DDIMScheduler(steps_offset=1)
    return DiTPipeline(transformer=transformer, vae=_autoencoder(), scheduler=scheduler)


def text_to_image(checker: Any = None) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    tokenizer = _tokenizer()
    config = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
    )
    scheduler: Any = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        **parts,
    )


def _autoencoder() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    shape: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(latent_channels=4, norm_num_groups=2, sample_size=8, **shape)


def _tokenizer() -> Any:
    """Characters as tokens: CLIP's own vocabulary would have to be downloaded."""
    import tempfile

    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", *map(chr, range(33, 127))]
    tokens += [token + "</w>" for token in tokens[2:]]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate([*tokens, "at</w>"])}))
        merges.write_text("#version: 0.2\na t</w>\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
