"""How long networks take beside each other, measured in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datafree.evaluation.evaluate import evaluating

ROUNDS = 15
LEAST = 3


@dataclass(frozen=True)
class Latency:
    """seconds: network -> median of its forward passes of `batch` images; the first network is what ratios refer to"""

    batch: int
    rounds: int
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        first = next(iter(self.seconds.values()))
        networks = {name: {"seconds": s, "ratio": s / first} for name, s in self.seconds.items()}
        return {"batch": self.batch, "rounds": self.rounds, "networks": networks}


def measure_latency(
    networks: Mapping[str, nn.Module], images: Tensor, *, device: torch.device, limit: float = 5.0
) -> Latency:
    """Time every network on the same images, in an order that rotates from round to round.

    images: (N, C, H, W), as the networks take them
    limit:  seconds, after which no further round starts; there are LEAST at least and ROUNDS at most
    """
    names, spent = list(networks), {name: [] for name in networks}
    inputs = images.to(device)
    with ExitStack() as stack, torch.inference_mode():
        for module in reversed(list(networks.values())):  # an ensemble before the parent that is a part of it
            stack.enter_context(evaluating(module, device))
        for module in networks.values():
            _seconds(module, inputs)  # the first pass pays for what is only done once
        start, done = time.perf_counter(), 0
        while done < LEAST or (done < ROUNDS and time.perf_counter() - start < limit):
            turn = done % len(names)
            for name in names[turn:] + names[:turn]:
                spent[name].append(_seconds(networks[name], inputs))
            done += 1
    return Latency(len(images), done, {name: statistics.median(each) for name, each in spent.items()})


def _seconds(module: nn.Module, inputs: Tensor) -> float:
    _wait(inputs.device)
    start = time.perf_counter()
    module(inputs)
    _wait(inputs.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
