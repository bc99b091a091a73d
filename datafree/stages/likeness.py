"""How alike the parents' units are, layer by layer, before and after matching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pleas
from pleas.matching.activations import activation_similarities
from pleas.symmetry import position_maps


def layer_similarity(evidence: pleas.Evidence) -> list[dict[str, Any]]:
    """Per layer, the mean correlation of its paired output units over the first parent and each other one.

    unmatched: units as they come        matched: as the merge pairs them
    """
    parents, symmetry = evidence.parents, evidence.parents.symmetry
    maps = [position_maps(symmetry, alignment) for alignment in evidence.alignments]
    found: dict[str, list[tuple[float, float]]] = {}
    for q in range(1, parents.count):
        for (name, dim), block in activation_similarities(evidence.statistics, parents.count, 0, q).items():
            if dim == 0 and block.shape[0] == block.shape[1]:
                first, second = (_places(maps[p], (name, dim), len(block)) for p in (0, q))
                pair = float(block.diagonal().mean()), float(block[first, second].mean())
                found.setdefault(name, []).append(pair)
    layers = {layer.weight: layer.name for layer in parents.layers}
    means = {name: torch.tensor(pairs).mean(0).tolist() for name, pairs in found.items() if name in layers}
    return [
        {"layer": layers[name], "unmatched": unmatched, "matched": matched}
        for name, (unmatched, matched) in means.items()
    ]


def _places(maps: dict[tuple[str, int], Tensor], axis: tuple[str, int], count: int) -> Tensor:
    return maps.get(axis, torch.arange(count))
