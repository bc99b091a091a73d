"""The weights in training, their moving average and the optimiser: all that a resumed run needs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pleas.layers.layer import CONVOLUTION
from pleas.refine.norms import use_batch_statistics
from pleas.refine.settings import RefineSettings

VECTOR = 16  # numbers of single precision in the widest register, AVX-512's
State = Mapping[str, Any]  # tensors, numbers and text in plain dicts and lists


class Diverged(Exception):
    """A loss or a gradient that is not finite, or a network far worse than the start."""


class Learner:
    """A copy of `module` whose every weight is trained by Adam.

    network: in training            average: the same network with moving averages in place of the weights, and of
    the batch norms' statistics; in evaluation mode
    """

    def __init__(self, module: nn.Module, settings: RefineSettings, device: torch.device) -> None:
        self.layout = training_layout(module, device)
        self.network = laid_out(copy.deepcopy(module).to(device), self.layout).eval().requires_grad_(True)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.settings, self.step = settings, 0
        use_batch_statistics(self.network, settings.batch_statistics)
        self._weights, self._averaged = _floating(self.network), _floating(self.average)
        self._optimiser = torch.optim.Adam(self.network.parameters(), lr=settings.rate)

    def learn(self, loss: Tensor, rate: float) -> None:
        """One step. Raises Diverged, weights untouched, for a loss or gradient that is not finite."""
        if not torch.isfinite(loss):
            raise Diverged(f"the loss became {float(loss.detach())}")
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        if not torch.isfinite(norm):
            raise Diverged(f"the gradient's norm became {float(norm)}")
        self._optimiser.param_groups[0]["lr"] = rate
        self._optimiser.step()
        self.step += 1
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average; its memory is short at first, for the start is not worth remembering."""
        decay = min(self.settings.average, self.step / (self.step + 10))
        for name, averaged in self._averaged.items():
            averaged.lerp_(self._weights[name], 1 - decay)

    def averaged(self) -> dict[str, Tensor]:
        """The average's weights by name, copied."""
        return _copied(self._averaged)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "weights": _copied(self._weights),
            "average": _copied(self._averaged),
            "optimiser": _plain(self._optimiser.state_dict()),
        }

    def load(self, state: State) -> None:
        self.step = state["step"]
        with torch.no_grad():
            for name in self._weights:
                self._weights[name].copy_(state["weights"][name])
                self._averaged[name].copy_(state["average"][name])
        self._optimiser.load_state_dict(_plain(dict(state["optimiser"])))


def schedule(done: float, warmup: float) -> float:
    """Share of the highest rate at the share `done` of a run: a linear rise, then a cosine to zero."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `module` with these numbers; everything else, memory layout included, stays its own."""
    result = copy.deepcopy(module)
    with torch.no_grad():
        for name, value in _floating(result).items():
            value.copy_(weights[name])
    return result


def _floating(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without the whole numbers among them (counts and indices)."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value for name, value in named.items() if value.is_floating_point()}


def laid_out(value: Any, layout: torch.memory_format = torch.channels_last) -> Any:
    """A network, or images (N, C, H, W), in this layout; channels last is the fastest for convolutions."""
    if isinstance(value, nn.Module):
        return value.to(memory_format=layout)  # type: ignore[call-overload]
    return value.contiguous(memory_format=layout) if value.dim() == 4 else value


def training_layout(network: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, except where oneDNN would then write past its workspace and corrupt the heap.

    That is the gradient of the weights of a strided 1x1 convolution that reads fewer inputs than a vector register
    holds (oneDNN issue 6035), such as a narrow shortcut that halves the image.
    """
    if device.type != "cpu":
        return torch.channels_last
    for weight, stride in _convolutions(network):
        strided = all(side == 1 for side in weight.shape[2:]) and any(step > 1 for step in stride)
        if weight.dim() == 4 and strided and weight.shape[1] < VECTOR:
            return torch.contiguous_format
    return torch.channels_last


def _convolutions(network: nn.Module) -> Iterator[tuple[Tensor, Sequence[int]]]:
    """Weight and stride of every convolution, whether a module or a node of a graph; blocks see to it themselves."""
    for module in network.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            yield module.weight, module.stride
        elif isinstance(module, fx.GraphModule):
            trained = dict(module.named_parameters())  # a blur's kernel, say, is none of them
            for node in module.graph.nodes:
                weight = node.args[1] if node.target is CONVOLUTION else None
                if isinstance(weight, fx.Node) and str(weight.target) in trained:
                    yield trained[str(weight.target)], node.args[3]


def _copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _plain(value: Any) -> Any:
    """A copy in which every tensor is its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
