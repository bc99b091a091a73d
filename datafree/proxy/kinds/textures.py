"""Images made by formula: edges, occlusion, 1/f spectra and self-similarity without a photograph.

Every generator is `(n, height, width, generator) -> float32 (n, 3, height, width) in [0, 1]`, draws all its
numbers from the one (CPU) generator, and works on all n images at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional

# Mean and spread, over photographs, of a picture's own channel mean and standard deviation.
_LEVEL, _LEVEL_SPREAD, _CONTRAST, _CONTRAST_SPREAD = 0.46, 0.12, 0.22, 0.06


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def photographic(values: Tensor, generator: Generator) -> Tensor:
    """Shift and scale each channel of each image to a mean and contrast as photographs have them; clip to
    [0, 1].
    """
    n, channels = values.shape[:2]
    values = values - values.mean((2, 3), keepdim=True)
    values = values / values.std((2, 3), keepdim=True).clamp_min(1e-4)
    # Channels of one picture move together: most of the level and contrast is common to them.
    level = _LEVEL + _LEVEL_SPREAD * (
        0.9 * torch.randn(n, 1, 1, 1, generator=generator)
        + 0.4 * torch.randn(n, channels, 1, 1, generator=generator)
    )
    contrast = _CONTRAST + _CONTRAST_SPREAD * (
        0.9 * torch.randn(n, 1, 1, 1, generator=generator)
        + 0.3 * torch.randn(n, channels, 1, 1, generator=generator)
    )
    return (values * contrast.clamp_min(0.03) + level).clamp(0, 1)


def _colours(n: int, fields: int, generator: Generator) -> Tensor:
    """(n, 3, fields): how each field tints the three channels; the first acts mostly on brightness."""
    tint = torch.randn(n, 3, fields, generator=generator) * 0.35
    tint[:, :, 0] += torch.randn(n, 1, generator=generator).sign()
    return tint


def _fields(n: int, count: int, height: int, width: int, generator: Generator) -> Tensor:
    """(n, count, height, width) fractal noise: octaves of smooth noise, amplitude falling by a factor drawn
    per image.
    """
    fall = uniform(generator, 0.4, 0.8, n, 1, 1, 1)
    total = torch.zeros(n, count, height, width)
    for octave in range(max(1, int(math.log2(max(height, width))))):
        side = 2**octave + 1
        coarse = torch.randn(n, count, side, side, generator=generator)
        if side < max(height, width):
            coarse = functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
        else:
            coarse = coarse[:, :, :height, :width]
        total += fall**octave * coarse
    return total


def fbm(n: int, height: int, width: int, generator: Generator) -> Tensor:
    """Fractal Brownian motion: clouds."""
    fields = _fields(n, 3, height, width, generator)
    return photographic(torch.einsum("nkf,nfhw->nkhw", _colours(n, 3, generator), fields), generator)


def spectrum(n: int, height: int, width: int, generator: Generator) -> Tensor:
    """Random phases under an amplitude of 1/f^s, s in [0.5, 2] per image, with its own anisotropy."""
    phases = torch.fft.rfft2(torch.randn(n, 3, height, width, generator=generator))
    fy = torch.fft.fftfreq(height).abs().view(1, 1, -1, 1) * height
    fx = torch.fft.rfftfreq(width).view(1, 1, 1, -1) * width
    stretch = torch.exp(torch.randn(n, 1, 1, 1, generator=generator) * 0.3)
    radius = torch.sqrt((fx * stretch) ** 2 + (fy / stretch) ** 2).clamp_min(0.5)
    fields = torch.fft.irfft2(phases * radius ** -uniform(generator, 0.5, 2.0, n, 1, 1, 1), s=(height, width))
    fields = fields / fields.std((2, 3), keepdim=True)
    return photographic(torch.einsum("nkf,nfhw->nkhw", _colours(n, 3, generator), fields), generator)


def warp(n: int, height: int, width: int, generator: Generator) -> Tensor:
    """Shader-like: a plane bent four times by rotated sines, coloured by a cosine palette."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    scale = uniform(generator, 0.5, 2.0, n, 1, 1, 1)
    plane = torch.stack([x, y]).expand(n, 2, height, width) * scale
    for _ in range(4):
        angle = uniform(generator, 0, 2 * math.pi, n)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(n, 2, 2)
        frequency = uniform(generator, 0.5, 4.0, n, 2, 1, 1)
        phase = uniform(generator, 0, 2 * math.pi, n, 2, 1, 1)
        turned = torch.einsum("nij,njhw->nihw", turn, plane)
        plane = plane + uniform(generator, 0.1, 0.8, n, 2, 1, 1) * torch.sin(frequency * turned + phase)
    value = torch.einsum("ni,nihw->nhw", torch.randn(n, 2, generator=generator), plane).unsqueeze(1)
    speed = uniform(generator, 0.3, 1.2, n, 1, 1, 1)
    shift = uniform(generator, 0, 0.35, n, 3, 1, 1) + uniform(generator, 0, 1, n, 1, 1, 1)
    return photographic(torch.cos(2 * math.pi * (speed * value + shift)), generator)


def dead_leaves(n: int, height: int, width: int, generator: Generator) -> Tensor:
    """Textured discs, ellipses and polygons that hide one another, sizes by the power law r^-3 of natural
    scenes.

    The leaf a pixel shows is the nearest one over it: the smallest number among the leaves that cover the
    pixel, found by an integer minimum over small windows around each leaf, so the cost is the leaves' area
    and the order of work cannot matter.
    """
    fine = 2 if max(height, width) <= 128 else 1  # draw twice as fine and average: smooth edges
    rows, columns = height * fine, width * fine
    leaves, side = 400, max(rows, columns)
    low, high = 0.03 * side, 0.6 * side
    u = torch.rand(n, leaves, generator=generator)
    radius = (low**-2 + u * (high**-2 - low**-2)) ** -0.5  # inverse of the distribution of density r^-3
    centre_y = uniform(generator, 0, rows, n, leaves)
    centre_x = uniform(generator, 0, columns, n, leaves)
    angle = uniform(generator, 0, 2 * math.pi, n, leaves)
    squash = uniform(generator, 0.4, 1.0, n, leaves)
    corners = torch.randint(2, 7, (n, leaves), generator=generator)  # 2: an ellipse, otherwise a polygon

    nearest = torch.full((n, rows * columns), leaves, dtype=torch.int64)  # `leaves` means the background
    for octave in range(math.ceil(math.log2(high / low))):
        image, leaf = torch.nonzero(
            (radius >= low * 2**octave) & (radius < low * 2 ** (octave + 1)), as_tuple=True
        )
        reach = min(math.ceil(low * 2 ** (octave + 1)), side)
        step = torch.arange(-reach, reach + 1)
        for part in torch.arange(len(leaf)).split(
            max(1, 4_000_000 // len(step) ** 2)
        ):  # bounds memory, not results
            i, k = image[part], leaf[part]
            cy, cx = centre_y[i, k].view(-1, 1, 1), centre_x[i, k].view(-1, 1, 1)
            row, column = cy.floor().long() + step.view(1, -1, 1), cx.floor().long() + step.view(1, 1, -1)
            dy, dx = row + 0.5 - cy, column + 0.5 - cx
            cos, sin = angle[i, k].cos().view(-1, 1, 1), angle[i, k].sin().view(-1, 1, 1)
            along, across = cos * dx + sin * dy, (cos * dy - sin * dx) / squash[i, k].view(-1, 1, 1)
            distance, sides = torch.hypot(along, across), corners[i, k].view(-1, 1, 1)
            turn = torch.remainder(torch.atan2(across, along), 2 * math.pi / sides) - math.pi / sides
            inside = torch.where(sides == 2, distance, distance * turn.cos() / torch.cos(math.pi / sides))
            seen = (
                (inside <= radius[i, k].view(-1, 1, 1))
                & (row >= 0)
                & (row < rows)
                & (column >= 0)
                & (column < columns)
            )
            place = (i.view(-1, 1, 1) * rows + row) * columns + column
            number = k.view(-1, 1, 1).expand_as(place)
            nearest.view(-1).scatter_reduce_(0, place[seen], number[seen], "amin")

    colour = torch.rand(n, leaves + 1, 1, generator=generator) + 0.3 * torch.randn(
        n, leaves + 1, 3, generator=generator
    )
    strength = uniform(generator, 0, 0.35, n, leaves + 1) ** 1.5
    which = torch.randint(0, 2, (n, leaves + 1), generator=generator)
    texture = _fields(n, 2, rows, columns, generator)
    texture = (texture / texture.std((2, 3), keepdim=True)).flatten(2)
    shown = torch.gather(colour, 1, nearest.unsqueeze(-1).expand(-1, -1, 3))
    picked = torch.gather(texture, 1, torch.gather(which, 1, nearest).unsqueeze(1)).squeeze(1)
    shown = shown + (torch.gather(strength, 1, nearest) * picked).unsqueeze(-1)
    picture = shown.transpose(1, 2).reshape(n, 3, rows, columns)
    return photographic(functional.avg_pool2d(picture, fine), generator)


def fractals(n: int, height: int, width: int, generator: Generator) -> Tensor:
    """One to three iterated function systems on clouds.

    Two to four affine maps each, singular values s1 >= s2 chosen so that sum(s1 + 2 s2) is in [(5 + m)/2,
    (6 + m)/2] for m maps, the range in which attractors neither collapse nor dissolve (Anderson and
    Farrell, WACV 2022); drawn by many parallel chains of the chaos game, counted in integers.
    """
    picture = fbm(n, height, width, generator)
    for layer in range(3):
        present = torch.rand(n, generator=generator) < (1.0, 0.6, 0.35)[layer]
        density = _attractors(n, height, width, generator)
        tone = density.sqrt() / density.sqrt().flatten(1).quantile(0.98, dim=1).clamp_min(0.2).view(n, 1, 1)
        tone = tone.clamp(0, 1).unsqueeze(1)
        body = torch.rand(n, 3, 1, 1, generator=generator)
        rim = torch.rand(n, 3, 1, 1, generator=generator)
        painted = rim + (body - rim) * tone
        cover = (tone * 3).clamp(0, 1) * present.view(n, 1, 1, 1)
        picture = picture * (1 - cover) + painted * cover
    return picture.clamp(0, 1)


def _attractors(n: int, height: int, width: int, generator: Generator) -> Tensor:
    """(n, height, width): how often the chaos game of one random system per image visits each pixel,
    slightly blurred.
    """
    maps = torch.randint(2, 5, (n, 1), generator=generator)
    used = torch.arange(4).view(1, 4) < maps
    # Singular values: shares of the target sum, s1 + 2 s2 per map, then s2 <= s1 <= 1 by splitting each
    # share.
    target = (5 + maps) / 2 + 0.5 * torch.rand(n, 1, generator=generator)
    share = uniform(generator, 0.6, 1.0, n, 4) * used
    share = (share / share.sum(1, keepdim=True) * target).clamp_max(2.9)
    second = share * uniform(generator, 0.15, 1 / 3, n, 4)
    first = share - 2 * second
    second, first = torch.minimum(second, first).clamp_max(0.96), torch.maximum(second, first).clamp_max(0.96)
    signs = torch.randint(0, 2, (2, n, 4), generator=generator) * 2.0 - 1
    left, right = uniform(generator, 0, 2 * math.pi, n, 4), uniform(generator, 0, 2 * math.pi, n, 4)
    stretch = torch.diag_embed(torch.stack([first * signs[0], second * signs[1]], -1))
    matrix = _rotation(left) @ stretch @ _rotation(right)
    offset = uniform(generator, -1, 1, n, 4, 2)
    weight = ((first * second).clamp_min(0.02) * used).cumsum(1)
    weight = weight / weight[:, -1:]

    steps, settle = 40, 8
    chains = max(256, 6 * height * width // (steps - settle))  # some six points a pixel
    table = torch.cat([matrix.flatten(2), offset], 2).transpose(1, 2)  # (n, 6, maps): a b c d e f
    x = y = torch.zeros(n, chains)
    seen: list[Tensor] = []
    for _ in range(steps):
        choice = torch.searchsorted(weight, torch.rand(n, chains, generator=generator)).clamp_max(3)
        a, b, c, d, e, f = torch.gather(table, 2, choice.unsqueeze(1).expand(-1, 6, -1)).unbind(1)
        x, y = a * x + b * y + e, c * x + d * y + f
        seen.append(torch.stack([x, y], -1))
    cloud = torch.cat(seen[settle:], 1)
    centre = cloud.mean(1, keepdim=True)
    extent = (cloud - centre).abs().flatten(1).quantile(0.95, dim=1).clamp_min(1e-3).view(n, 1, 1)
    zoom = uniform(generator, 0.25, 0.75, n, 1, 1)
    place = (cloud - centre) / extent * zoom + uniform(generator, -0.4, 0.4, n, 1, 2)
    row = ((place[..., 1] + 1) / 2 * height).floor().long()
    column = ((place[..., 0] + 1) / 2 * width).floor().long()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    flat = (torch.arange(n).view(n, 1) * height + row) * width + column
    counts = torch.bincount(flat[inside], minlength=n * height * width)
    density = counts.view(n, 1, height, width).float()
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel.view(3, 1) * kernel / 16).view(1, 1, 3, 3)
    return functional.conv2d(functional.pad(density, (1, 1, 1, 1), mode="replicate"), kernel).squeeze(1)


def _rotation(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(*angle.shape, 2, 2)


def random_network(n: int, height: int, width: int, generator: Generator) -> Tensor:
    """The output of an untrained upsampling network: noise, oriented filters, a style per image, at every
    scale.
    """
    channels, side = 24, 4
    value = torch.randn(n, channels, side, side, generator=generator)
    while True:
        weight = torch.randn(channels, channels, 3, 3, generator=generator)
        mixed = functional.conv2d(functional.pad(value, (1, 1, 1, 1), mode="reflect"), weight)
        mixed = mixed * (1 + 0.7 * torch.randn(n, channels, 1, 1, generator=generator))
        mixed = mixed / mixed.std((2, 3), keepdim=True).clamp_min(1e-3)
        bias = uniform(generator, -0.5, 0.5, n, channels, 1, 1)
        noise = torch.randn(n, 1, side, side, generator=generator) * uniform(generator, 0, 0.3, n, 1, 1, 1)
        value = functional.leaky_relu(mixed + noise + bias, 0.2)
        if side >= max(height, width):
            break
        side = min(2 * side, max(height, width))
        value = functional.interpolate(value, (side, side), mode="bilinear", align_corners=False)
    value = value[:, :, :height, :width]
    colour = torch.randn(n, 3, channels, generator=generator) * 0.4 + torch.randn(
        n, 1, channels, generator=generator
    )
    return photographic(torch.einsum("nkf,nfhw->nkhw", colour, value), generator)


TEXTURES: dict[str, Callable[[int, int, int, Generator], Tensor]] = {
    "fractals": fractals,
    "leaves": dead_leaves,
    "network": random_network,
    "fbm": fbm,
    "warp": warp,
    "spectrum": spectrum,
}
