"""Images as a caller has them, in memory: tensors, arrays, PIL images, loaders become one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datafree.errors import UsageError
from datafree.images.preprocess import Preprocess
from datafree.proxy.kinds.images import frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BYTES = 8 * 2**30  # of a loader's images in memory
_WANTED = "give a 4-D tensor (N, C, H, W), a list of PIL images, or a DataLoader"


@dataclass(frozen=True, repr=False)
class Images:
    """Images in memory.

    values:  (N, C, H, W) on the CPU: uint8 pixels from 0 to 255, which every network normalises for itself, or
             float32 inputs as the networks take them, normalised already
    source:  what they are, for messages: "inversion", "images"
    sources: of every image, where there are several
    facts:   what making them measured, by source
    notes:   what is to be said of them, one sentence each
    """

    values: Tensor
    source: str = "images"
    sources: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        channels, height, width = self.values.shape[1:]
        kind = "uint8 pixels" if self.are_pixels else "normalised inputs"
        return f"Images({len(self)} of {self.source}, {channels}x{height}x{width}, {kind})"

    def __len__(self) -> int:
        return len(self.values)

    @property
    def are_pixels(self) -> bool:
        return self.values.dtype == torch.uint8

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The images at `indices`, (n, C, H, W)."""
        return self.values[torch.as_tensor(indices, dtype=torch.int64)]

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order, `size` at a time (the last batch may be smaller)."""
        return iter(self.values.split(size))

    def in_eight_bits(self) -> tuple[Tensor, Preprocess | None]:
        """uint8 (N, C, H, W), and what makes normalised inputs of them again, to 1/510 of every channel's range.

        Pixels are pixels already, and every network knows what to do with them: None.
        """
        if self.are_pixels:
            return self.values, None
        low, high = self.values.amin((0, 2, 3)), self.values.amax((0, 2, 3))
        span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        steps = (self.values - low.view(-1, 1, 1)) / span.view(-1, 1, 1) * 255
        size = (self.values.shape[2], self.values.shape[3])
        back = Preprocess(size, tuple((-low / span).tolist()), tuple((1 / span).tolist()))
        return steps.round().to(torch.uint8), back

    def plot(self, count: int = 64, columns: int = 16) -> Figure:
        """The first `count` images beside each other, as a matplotlib figure."""
        from datafree.library.pictures import sheet

        return sheet(self.in_eight_bits()[0][:count], columns)


class AsTheyAre(Preprocess):
    """The preprocessing of inputs that are normalised already: none."""

    def __call__(self, images: Tensor) -> Tensor:
        return images

    @classmethod
    def for_inputs(cls, shape: Sequence[int]) -> AsTheyAre:
        """shape: (C, H, W) of one input."""
        channels, height, width = shape
        return cls((height, width), (0.0,) * channels, (1.0,) * channels)


def take_images(given: Any, what: str, count: int | None = None) -> Images | list[Image.Image]:
    """Images of any kind a caller may have; PIL images stay until somebody says which size they become.

    count: at most so many, the first ones
    Raises UsageError, one sentence that names `what`, the argument they came as.
    """
    found = _taken(given, what, count)
    if isinstance(found, list):
        return found
    if count is not None:
        found = replace(found, values=found.values[:count], sources=found.sources[:count])
    if not len(found):
        raise UsageError(f"{what} holds no image: {_WANTED}")
    return found


def pictures_framed(pictures: Sequence[Image.Image], size: tuple[int, int], channels: int) -> Images:
    """PIL images as pixels of one size: resized until `size` is just covered, and cut around the centre."""
    mode = "L" if channels == 1 else "RGB"
    arrays = [np.array(picture.convert(mode)) for picture in pictures]
    tensors = [torch.from_numpy(a if a.ndim == 3 else a[..., None]).permute(2, 0, 1) for a in arrays]
    return Images(torch.cat([frame(tensor[None], size) for tensor in tensors]))


def _taken(given: Any, what: str, count: int | None) -> Images | list[Image.Image]:
    if isinstance(given, Images):
        return given
    if isinstance(given, Image.Image):
        raise UsageError(f"{what} is one PIL image: give a list of them, better 256 or more")
    if isinstance(given, np.ndarray):
        given = _from_array(given, what)
    if isinstance(given, Tensor):
        return Images(_checked(given, what))
    if isinstance(given, list | tuple) and given and all(isinstance(one, Image.Image) for one in given):
        return list(given)[:count]
    if isinstance(given, list | tuple) and given and all(_is_image(one) for one in given):
        return Images(_checked(_joined([one[None] for one in given], what), what))
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping):
        return Images(_checked(_joined(_inputs_of(given, what, count), what), what))
    raise UsageError(f"{what} is a {type(given).__name__}: {_WANTED}")


def _is_image(one: Any) -> bool:
    return isinstance(one, Tensor) and one.ndim == 3


def _from_array(array: np.ndarray, what: str) -> Tensor:
    if (
        array.dtype == np.uint8
        and array.ndim == 4
        and array.shape[1] not in (1, 3)
        and array.shape[3] in (1, 3)
    ):
        array = array.transpose(0, 3, 1, 2)
    if array.dtype.kind not in "uf":
        raise UsageError(f"{what} is an array of {array.dtype}: {_WANTED} (uint8 pixels, or float inputs)")
    return torch.from_numpy(np.ascontiguousarray(array))


def _checked(values: Tensor, what: str) -> Tensor:
    shape = tuple(values.shape)
    if values.ndim == 3:
        raise UsageError(
            f"{what} is one tensor of shape {shape}: images need 4 dimensions, as values[None] has"
        )
    if values.ndim != 4:
        raise UsageError(f"{what} is a tensor of shape {shape}: images are (N, C, H, W)")
    if values.dtype == torch.uint8:
        return values.detach().cpu()
    if not values.is_floating_point():
        raise UsageError(
            f"{what} is {values.dtype}: give uint8 pixels from 0 to 255, or floats as the networks take them "
            "(normalised)"
        )
    values = values.detach().float().cpu()
    if not bool(values.isfinite().all()):
        raise UsageError(f"{what} holds NaN or infinity: check how the images are normalised")
    return values


def _inputs_of(loader: Iterable[Any], what: str, count: int | None) -> list[Tensor]:
    """The images of every batch of a loader, labels left out."""
    found: list[Tensor] = []
    images = size = 0
    for number, batch in enumerate(loader):
        inputs = _of_batch(batch, f"batch {number} of {what}")[0]
        found.append(inputs)
        images, size = images + len(inputs), size + inputs.numel() * inputs.element_size()
        if count is not None and images >= count:
            break
        if size > MOST_BYTES:
            raise UsageError(
                f"{what} gives more than {MOST_BYTES / 2**30:.0f} GiB of images, which are kept in memory: say "
                "count=512, or another number, to take the first ones"
            )
    return found


def _of_batch(batch: Any, where: str) -> tuple[Tensor, Tensor | None]:
    """Images and labels of what a loader gives: x, (x, y), or a mapping that holds one 4-D tensor."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        inputs = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim == 4]
        labels = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim == 1]
        if len(inputs) == 1:
            return inputs[0], labels[0] if len(labels) == 1 else None
    elif isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        labels = batch[1] if len(batch) == 2 and isinstance(batch[1], Tensor) and batch[1].ndim < 2 else None
        return batch[0], labels
    kind = (
        f"a mapping with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    )
    raise UsageError(f"{where} is {kind}: give batches x (N, C, H, W), or pairs (x, y)")


def _joined(batches: Sequence[Tensor], what: str) -> Tensor:
    if not batches:
        raise UsageError(f"{what} holds no image: {_WANTED}")
    shapes = {(tuple(batch.shape[1:]), batch.dtype) for batch in batches}
    if len(shapes) > 1:
        seen = " and ".join(sorted(f"{shape} {kind}" for shape, kind in shapes)[:2])
        raise UsageError(f"{what} holds images of {seen}: give all of them one size and one type")
    return torch.cat([batch.cpu() for batch in batches])


def take_labelled(given: Any, what: str) -> tuple[Images, np.ndarray]:
    """Images and their labels, int64 (N,), from a pair (x, y) of tensors or a loader of such pairs."""
    pairs: Iterable[Any] = given
    if isinstance(given, list | tuple) and len(given) == 2 and all(hasattr(one, "shape") for one in given):
        x, y = (torch.as_tensor(one) for one in given)
        pairs = [(x, y)]
    elif isinstance(given, Tensor | np.ndarray | str | Mapping) or not isinstance(given, Iterable):
        raise UsageError(
            f"{what} has no labels: give a pair (x, y) of tensors, or a DataLoader of such pairs"
        )
    images, labels = [], []
    for number, batch in enumerate(pairs):
        x, y = _of_batch(batch, f"batch {number} of {what}")
        if y is None:
            raise UsageError(f"batch {number} of {what} has no labels: give pairs (x, y), y of shape (N,)")
        if y.is_floating_point() or len(y) != len(x) or (len(y) and int(y.min()) < 0):
            raise UsageError(
                f"batch {number} of {what} has labels {tuple(y.shape)} {y.dtype} for images {tuple(x.shape)}: "
                "labels are whole numbers from 0 on, one an image"
            )
        images.append(x)
        labels.append(y.reshape(-1).cpu())
    found = Images(_checked(_joined(images, what), what))
    return found, torch.cat(labels).numpy().astype(np.int64)
