"""The small denoising diffusion models of `../shared` (28 x 28, grey) as diffusers pipelines.

    - kind: diffusion
      pipeline: "python:../benchmarks/ddpm.py:pipeline"
      arguments: {weights: "${DATAFREE_DATA}/checkpoints/brianpulfer_ddpm_mnist.pt"}
      scheduler: own
      steps: 50

The networks normalise their input over the whole image first, so they cannot see its overall level, and the
error they make in it grows over the steps until an image is all white or black. Their training images are
objects on black: here the predicted noise is shifted so that the image it implies has a black background.

Look at samples:  python benchmarks/ddpm.py CHECKPOINT SHEET.png
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn
from torch.nn.functional import silu

_STEPS, _EMBEDDING, _BETAS = 1000, 100, (1e-4, 0.02)
_BACKGROUND = 0.1  # share of an image's pixels that are certainly background


class _Block(nn.Module):
    """Layer norm over the whole map, convolution, SiLU, convolution, SiLU."""

    def __init__(self, side: int, before: int, after: int, normed: bool = True) -> None:
        super().__init__()
        self.ln = nn.LayerNorm([before, side, side])
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.normed = normed  # a block without norm has its weights all the same

    def forward(self, value: Tensor) -> Tensor:
        value = self.ln(value) if self.normed else value
        return silu(self.conv2(silu(self.conv1(value))))


def _stage(side: int, *channels: int, last_normed: bool = True) -> nn.Sequential:
    *inner, last = itertools.pairwise(channels)
    blocks = [_Block(side, *pair) for pair in inner]
    return nn.Sequential(*blocks, _Block(side, *last, normed=last_normed))


def _time(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(_EMBEDDING, channels), nn.SiLU(), nn.Linear(channels, channels))


class SmallUNet(ModelMixin, ConfigMixin):
    """Predicts the noise in a 28 x 28 grey image in [-1, 1] at a step; names as in the checkpoints."""

    @register_to_config
    def __init__(self, sample_size: int = 28, in_channels: int = 1) -> None:
        super().__init__()
        self.time_embed = nn.Embedding(_STEPS, _EMBEDDING)
        self.te1, self.b1 = _time(1), _stage(28, 1, 10, 10, 10)
        self.down1 = nn.Conv2d(10, 10, 4, 2, 1)
        self.te2, self.b2 = _time(10), _stage(14, 10, 20, 20, 20)
        self.down2 = nn.Conv2d(20, 20, 4, 2, 1)
        self.te3, self.b3 = _time(20), _stage(7, 20, 40, 40, 40)
        self.down3 = nn.Sequential(nn.Conv2d(40, 40, 2, 1), nn.SiLU(), nn.Conv2d(40, 40, 4, 2, 1))
        self.te_mid, self.b_mid = _time(40), _stage(3, 40, 20, 20, 40)
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2, 1)
        )
        self.te4, self.b4 = _time(80), _stage(7, 80, 40, 20, 20)
        self.up2 = nn.ConvTranspose2d(20, 20, 4, 2, 1)
        self.te5, self.b5 = _time(40), _stage(14, 40, 20, 10, 10)
        self.up3 = nn.ConvTranspose2d(10, 10, 4, 2, 1)
        self.te_out, self.b_out = _time(20), _stage(28, 20, 10, 10, 10, last_normed=False)
        self.conv_out = nn.Conv2d(10, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        time = self.time_embed(timestep.to(sample.device).expand(len(sample)))

        def at(project: nn.Module) -> Tensor:
            return project(time)[:, :, None, None]

        high = self.b1(sample + at(self.te1))
        middle = self.b2(self.down1(high) + at(self.te2))
        low = self.b3(self.down2(middle) + at(self.te3))
        value = self.b_mid(self.down3(low) + at(self.te_mid))
        value = self.b4(torch.cat([low, self.up1(value)], 1) + at(self.te4))
        value = self.b5(torch.cat([middle, self.up2(value)], 1) + at(self.te5))
        value = self.b_out(torch.cat([high, self.up3(value)], 1) + at(self.te_out))
        return UNet2DOutput(sample=self._on_black(sample, self.conv_out(value), timestep))

    def _on_black(self, sample: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The noise, shifted so that the image it implies has its background at -1, which is black."""
        kept = (1 - torch.linspace(*_BETAS, _STEPS)).cumprod(0)[timestep.cpu()].to(sample.device)
        image = (sample - (1 - kept).sqrt() * noise) / kept.sqrt()
        level = image.flatten(1).quantile(_BACKGROUND, dim=1).view(-1, 1, 1, 1)
        return noise + (level + 1) * kept.sqrt() / (1 - kept).sqrt()


def pipeline(weights: str) -> DDPMPipeline:
    """The checkpoint in file `weights` as an unconditional pipeline."""
    state = torch.load(Path(weights), weights_only=True, map_location="cpu")
    network = SmallUNet()
    network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    scheduler = DDPMScheduler(_STEPS, *_BETAS, beta_schedule="linear")
    denoiser: Any = network  # declared to be a UNet2DModel; any network with its interface works
    return DDPMPipeline(unet=denoiser, scheduler=scheduler)


def main() -> None:
    from PIL import Image

    checkpoint, target = sys.argv[1:]
    sampler = pipeline(checkpoint)
    generators = [torch.Generator().manual_seed(seed) for seed in range(48)]
    output: Any = sampler(batch_size=48, generator=generators, num_inference_steps=50, output_type="pt")
    rows = output.images[:, 0].mul(255).round().to(torch.uint8).reshape(4, 12, 28, 28)
    Image.fromarray(rows.permute(0, 2, 1, 3).reshape(4 * 28, 12 * 28).numpy()).save(target)


if __name__ == "__main__":
    main()
