"""The start of an inversion in the colours, contrast and background that a network knows from its training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from datafree.proxy.kinds.targets import Target

_TRIALS = 12  # iterations of L-BFGS: more of them lower the loss no further


@torch.enable_grad()
def fit_colours(pixels: Tensor, targets: Sequence[Target]) -> Tensor:
    """`pixels` recoloured so that the first batch norm of every target sees the statistics it remembers.

    One affine map of a pixel's channels, the same for the whole batch and clamped to [0, 1], is found by L-BFGS on the
    first batch norm's term of the loss alone. Its numbers are channels * (channels + 1), so a dozen runs of the first
    convolution settle it. A steep map with a low offset makes a black background: what lies below it is clamped.

    pixels: (n, channels, height, width) in [0, 1]. Where no map lowers the loss they come back as they are.
    """
    channels = pixels.shape[1]
    middle = pixels.mean((0, 2, 3), keepdim=True)
    plain = torch.cat([torch.eye(channels, device=pixels.device), middle.view(channels, 1)], dim=1)
    affine = plain.clone().requires_grad_()

    def recoloured(affine: Tensor) -> Tensor:
        weight, offset = affine[:, :channels].reshape(channels, channels, 1, 1), affine[:, channels]
        return functional.conv2d(pixels - middle, weight, offset).clamp(0, 1)

    def misfit(affine: Tensor) -> Tensor:
        seen = recoloured(affine)
        return torch.stack([target.first_term(seen) for target in targets]).sum()

    def closure() -> Tensor:
        loss = misfit(affine)
        (affine.grad,) = torch.autograd.grad(loss, [affine])
        return loss

    torch.optim.LBFGS([affine], max_iter=_TRIALS, line_search_fn="strong_wolfe").step(closure)
    with torch.no_grad():
        better = misfit(affine) < misfit(plain)
        return recoloured(affine) if better else pixels
