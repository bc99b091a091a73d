"""Looking at proxies: contact sheets, and a folder of PNG files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from datafree.errors import UsageError
from datafree.proxy.build import ProxySet
from datafree.proxy.source import SHARD

_GAP = 2  # pixels between images


def contact_sheet(proxies: ProxySet, path: Path, count: int = 64, columns: int = 16) -> None:
    """Write the first `count` images as one picture, in their order, small ones enlarged by a whole factor."""
    sheet_image(proxies, count, columns).save(path)


def sheet_image(proxies: ProxySet, count: int, columns: int, side: int | None = None) -> Image.Image:
    """The same picture in memory. side: images whose longest side exceeds it are made smaller."""
    images = proxies.batch(range(min(count, len(proxies))))
    if proxies.channels == 1:
        images = images.expand(-1, 3, -1, -1)
    longest = max(proxies.size)
    if side is not None and longest > side:
        size = [max(1, round(extent * side / longest)) for extent in proxies.size]
        images = F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)
    height, width = images.shape[2:]
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = torch.full((3, rows * (height + _GAP), columns * (width + _GAP)), 255, dtype=torch.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        sheet[:, top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    factor = max(1, round(64 / max(height, width)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def export_folder(proxies: ProxySet, folder: Path) -> None:
    """Write every image as PNG, one subfolder per source: 1-inversion/000000.png, ... in the order of the set.

    Raises UsageError when the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: choose another folder for the images")
    names = [f"{number + 1}-{report.kind}" for number, report in enumerate(proxies.manifest)]
    for name in names:
        (folder / name).mkdir(parents=True)
    for start in range(0, len(proxies), SHARD):
        chosen = range(start, min(start + SHARD, len(proxies)))
        for index, image in zip(chosen, proxies.batch(chosen), strict=True):
            array = image[0].numpy() if proxies.channels == 1 else image.permute(1, 2, 0).numpy()
            Image.fromarray(array).save(folder / names[int(proxies.order[index, 0])] / f"{index:06}.png")
