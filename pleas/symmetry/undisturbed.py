"""Call a network of somebody else's without leaving a mark on it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STORES = ("_parameters", "_buffers", "_modules")  # what a module keeps beside its plain attributes


@contextlib.contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards everything is as it was, also where the body raises.

    Restored: the mode of every submodule on its own, the values and the identity of parameters and buffers, plain
    attributes (caches, counters, stored features), and the random state of torch, numpy and Python. The values are
    copied on entry: this takes the memory of the networks once more.
    """
    parts = list({id(part): part for module in modules for part in module.modules()}.values())
    attributes = [(part, dict(part.__dict__)) for part in parts]
    stores = [(part.__dict__[name], dict(part.__dict__[name])) for part in parts for name in STORES]
    values = [(tensor, tensor.data, tensor.detach().clone()) for tensor in _tensors_of(*modules)]
    with same_random_state(*modules), torch.no_grad():
        try:
            for module in modules:
                module.eval()
            yield
        finally:
            with torch.no_grad():  # the body may have asked for gradients
                for part, known in attributes:
                    _restore(part.__dict__, known)
                for store, known in stores:
                    _restore(store, known)
                for tensor, data, value in values:
                    _put_back(tensor, data, value)


def own_copy(images: Any) -> Any:
    """A batch, or a tuple of batches, that a forward may change in place."""
    return images.clone() if isinstance(images, Tensor) else type(images)(map(own_copy, images))


def _restore(store: dict[str, Any], known: dict[str, Any]) -> None:
    if store.keys() != known.keys() or any(store[key] is not value for key, value in known.items()):
        store.clear()
        store.update(known)


def _tensors_of(*modules: nn.Module) -> list[Tensor]:
    found = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return list({id(t): t for t in found if not t.is_meta and not nn.parameter.is_lazy(t)}.values())


def _put_back(tensor: Tensor, data: Tensor, value: Tensor) -> None:
    if tensor.data_ptr() != data.data_ptr():  # `weight.data = ...` in a forward
        tensor.data = data
    if not _same(tensor, value):
        tensor.copy_(value)


def _same(tensor: Tensor, value: Tensor) -> bool:
    """Bit for bit, NaN included."""
    there = (tensor == value) | ((tensor != tensor) & (value != value))
    return tensor.shape == value.shape and bool(there.all())


def _cuda_devices(*modules: nn.Module) -> list[torch.device]:
    return list({t.device for t in _tensors_of(*modules) if t.device.type == "cuda"})


@contextlib.contextmanager
def same_random_state(*modules: nn.Module) -> Iterator[None]:
    """Afterwards torch (on the CPU and where the modules are), numpy and Python draw the numbers they would have."""
    ours, theirs = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state a forward would draw from
    try:
        with torch.random.fork_rng(devices=_cuda_devices(*modules)):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)  # noqa: NPY002
