"""Layers across units: a linear map over tokens (MLP-Mixer) acts on a transposed tensor, so that its rows are units.

Elsewhere a row is one image at one position, the same for both parents. Here the rows of the two parents stand in
different orders until the units are matched, and their joint moments mean nothing. What needs no order is the mean
over the rows: matching reads that, and a second pass pairs the rows of the matched parents.
"""

from __future__ import annotations

from torch import fx

from pleas.errors import UnsupportedModel
from pleas.layers import BatchNorm, Layer, find_layers, find_norms
from pleas.rows import is_wide
from pleas.symmetry import Symmetry

Crossed = dict[str, tuple[int, ...]]  # node -> dimensions of its input, beside the channels, that hold units


def crossed_nodes(symmetry: Symmetry) -> Crossed:
    """The nodes of layers whose rows are units of classes that may be permuted.

    Raises UnsupportedModel where such rows cannot be told from images, or the statistics have no place for them.
    """
    nodes = {node.name: node for node in symmetry.program.graph.nodes}
    found: Crossed = {}
    for layer in find_layers(symmetry.program):
        channels = 1 if layer.is_convolution else -1
        for name in layer.nodes:
            dims = _dims(symmetry, nodes[name], channels)
            if dims and is_wide(layer):
                raise _refuse(
                    layer, nodes[name], "has too many inputs for second moments and units as its rows"
                )
            if 0 in dims:
                raise _refuse(layer, nodes[name], "has units in its batch dimension")
            if dims:
                found[name] = dims
    for norm in find_norms(symmetry.program):
        if _dims(symmetry, nodes[norm.node], 1):
            raise _refuse(norm, nodes[norm.node], "stands alone and has units as its positions")
    return found


def crossed_layers(symmetry: Symmetry) -> tuple[Layer, ...]:
    """The layers of these nodes."""
    crossed = crossed_nodes(symmetry)
    return tuple(x for x in find_layers(symmetry.program) if any(node in crossed for node in x.nodes))


def needs_matching(symmetry: Symmetry) -> tuple[Layer, ...]:
    """The layers whose statistics take a second pass, once the units are matched: grouped and crossed ones."""
    crossed = {layer.name for layer in crossed_layers(symmetry)}
    return tuple(x for x in find_layers(symmetry.program) if x.groups > 1 or x.name in crossed)


def _dims(symmetry: Symmetry, node: fx.Node, channels: int) -> tuple[int, ...]:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    own = channels % source.meta["val"].dim()
    return tuple(d for d in sorted(symmetry.spread(source.name, symmetry.output)) if d != own)


def _refuse(site: Layer | BatchNorm, node: fx.Node, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"module '{site.name}' ({node.target}) {why}: the parents' rows cannot be paired there"
    )
