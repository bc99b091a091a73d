"""Batch norms in training: on the statistics of each batch, which they keep a running mean of, as in training."""

from __future__ import annotations

import torch
from torch import fx, nn

_STORED = torch.ops.aten._native_batch_norm_legit_no_training.default
_OWN = torch.ops.aten._native_batch_norm_legit.default


def use_batch_statistics(network: nn.Module, on: bool) -> None:
    """Let every batch norm of `network` normalise by the batch at hand (on), or by what it has stored (off).

    In place; a merged network's graph has batch norms as ops, whose name says which of the two they do. Other
    modules keep their mode: dropout stays off.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(on)
        if isinstance(module, fx.GraphModule):
            _switch(module, on)


def _switch(network: fx.GraphModule, on: bool) -> None:
    for node in network.graph.nodes:
        if on and node.target is _STORED:
            *vectors, momentum, eps = node.args
            node.target, node.args = _OWN, (*vectors, True, momentum, eps)
        elif not on and node.target is _OWN:
            *vectors, _, momentum, eps = node.args
            node.target, node.args = _STORED, (*vectors, momentum, eps)
    network.recompile()
