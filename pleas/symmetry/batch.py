"""Where the images of a batch stand in a value of the graph: not always first (tokens first, windows in the batch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pleas.symmetry.copies import device_of, unwrap
from pleas.symmetry.program import Program, execute, state_of

IMAGES = 3  # in the trial run: few sizes of networks are multiples of three
CHANGED = 1  # the image that is another one in the second run


@dataclass(frozen=True)
class BatchPlace:
    """Dimension `dim` holds `outer * images * inner` positions; image i has those at (o * images + i) * inner + j.

    The usual value has the images first: BatchPlace(0, 1, 1). Tokens first, (T, N, C), is BatchPlace(1, 1, 1), the
    same flattened to (T * N, C) is BatchPlace(0, T, 1), and windows cut from every image, (N * W, ...), are
    BatchPlace(0, 1, W).
    """

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def is_usual(self) -> bool:
        """Whether the first dimension is the batch, though every image may have several places there in a row."""
        return self.dim == 0 and self.outer == 1


USUAL = BatchPlace(0)


def images_first(value: Tensor, place: BatchPlace) -> Tensor:
    """The value with its images first: (N, ...), where an image's several places become dimensions of their own.

    (T, N, C) -> (N, T, C);  (T * N, C) -> (N, T, C);  (N * W, T, C) -> (N, W, T, C);  (N, C, H, W) as it is.
    """
    parts = [size for size in (place.outer, place.inner) if size > 1]
    if not parts and place.dim == 0:
        return value
    count = value.shape[place.dim] // (place.outer * place.inner)
    split = value.unflatten(place.dim, (place.outer, count, place.inner)).movedim(place.dim + 1, 0)
    kept = [size for d, size in enumerate(split.shape) if d == 0 or d not in _ones(place)]
    return split.reshape(kept)


def batch_places(program: Program, model: nn.Module, example: Tensor) -> dict[str, BatchPlace]:
    """Node name -> where the images stand in its value, for every value that some op reads and that has them.

    Most values are told by the symbol of the batch size. For the rest the graph is run on two batches that differ in
    one image, in float64: what differs belongs to that image. Values that mix images, or of which nothing differs,
    are left out.
    """
    found = {node.name: USUAL for node in program.graph.nodes if _is_plain(program, node)}
    if len(found) == sum(1 for node in program.graph.nodes if _is_tensor(node)):
        return found
    count = program.batch or IMAGES
    generator = torch.Generator().manual_seed(0)
    first, other = (torch.randn((count, *example.shape[1:]), generator=generator).double() for _ in range(2))
    second = first.clone()
    second[min(CHANGED, count - 1)] = other[0]
    model = unwrap(model)
    tensors = state_of(program, model)
    state = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}

    def visit(node: fx.Node, args: list[tuple], kwargs: list[dict]) -> None:
        for source, pair in _read(node, args):
            if source.name not in found:
                place = _place_of(pair[0] != pair[1], count)
                if place is not None:
                    found[source.name] = place

    with torch.no_grad():
        execute(program.graph, [state, state], [x.to(device_of(model)) for x in (first, second)], visit)
    return found


def _is_tensor(node: fx.Node) -> bool:
    return node.op in ("call_function", "placeholder") and isinstance(node.meta.get("val"), Tensor)


def _is_plain(program: Program, node: fx.Node) -> bool:
    """The first size is the batch's symbol itself. Compared as text: comparing symbols would fix them."""
    if program.batch is not None or not _is_tensor(node) or not node.meta["val"].dim():
        return False
    images = next(n for n in program.graph.nodes if n.op == "placeholder")
    return str(node.meta["val"].shape[0]) == str(images.meta["val"].shape[0])


def _read(node: fx.Node, args: list[tuple]) -> Iterator[tuple[fx.Node, tuple[Tensor, Tensor]]]:
    """Sources of a node whose values are tensors, with both runs' values."""
    for source, one, two in zip(node.args, *args, strict=True):
        if isinstance(source, fx.Node) and isinstance(one, Tensor):
            yield source, (one, two)
        elif isinstance(source, list | tuple):
            for inner in zip(source, one, two, strict=True):
                if isinstance(inner[0], fx.Node) and isinstance(inner[1], Tensor):
                    yield inner[0], inner[1:]


def _place_of(differs: Tensor, count: int) -> BatchPlace | None:
    """The one place that explains which positions differ between two batches that differ in one image."""
    image = min(CHANGED, count - 1)
    for dim, size in enumerate(differs.shape):
        along = differs.movedim(dim, 0).reshape(size, -1).any(1)
        if size % count or bool(along.all()) or not bool(along.any()):
            continue
        share = size // count
        for inner in sorted((d for d in range(1, share + 1) if share % d == 0), reverse=True):
            places = torch.arange(size, device=along.device) // inner % count == image
            if torch.equal(places, along):
                return BatchPlace(dim, share // inner, inner)
    return None


def _ones(place: BatchPlace) -> set[int]:
    """Dimensions after 0 that `images_first` made and that have one position."""
    return {place.dim + 1 + k for k, size in enumerate((place.outer, place.inner)) if size == 1}
