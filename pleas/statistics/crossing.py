"""Layers across units: a linear map over tokens (MLP-Mixer) acts on a transposed tensor, so that its rows are units.

Elsewhere a row is one image at one position, the same for all parents. Here the rows of the parents stand in different
orders until the units are matched. What needs no order is the mean over the rows: matching reads that. The solve runs
parents whose units are matched already, so that it can pair the rows.
"""

from __future__ import annotations

from torch import fx

from pleas.errors import UnsupportedModel
from pleas.layers.layer import BatchNorm, Layer, find_layers, find_norms, is_wide
from pleas.symmetry import Symmetry


def crossed_dims(symmetry: Symmetry, value: fx.Node, channels: int) -> tuple[int, ...]:
    """Dimensions of a value, beside that of its channels, along which units that may be permuted vary."""
    own = channels % value.meta["val"].dim()
    return tuple(d for d in sorted(symmetry.spread(value.name, symmetry.output)) if d != own)


def check_rows_are_images(symmetry: Symmetry) -> None:
    """Raise UnsupportedModel where the rows of a layer cannot be told from images, or are too many to keep."""
    nodes = {node.name: node for node in symmetry.program.graph.nodes}
    for layer in find_layers(symmetry.program):
        channels = 1 if layer.is_convolution else -1
        for name in layer.nodes:
            dims = crossed_dims(symmetry, nodes[name].args[0], channels)  # type: ignore[arg-type]
            if dims and is_wide(layer):
                raise _refuse(
                    layer, nodes[name], "has too many inputs for second moments and units as its rows"
                )
            if 0 in dims:
                raise _refuse(layer, nodes[name], "has units in its batch dimension")
    for norm in find_norms(symmetry.program):
        if crossed_dims(symmetry, nodes[norm.node].args[0], 1):  # type: ignore[arg-type]
            raise _refuse(norm, nodes[norm.node], "stands alone and has units as its positions")


def _refuse(site: Layer | BatchNorm, node: fx.Node, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"module '{site.name}' ({node.target}) {why}: the parents' rows cannot be paired there"
    )
