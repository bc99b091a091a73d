"""Whose image a proxy is: how well it fits what each parent's batch norms remember of its training images.

A network that was never shown anything like an image may still be sure of it, so neither its confidence nor its logits
tell that it should be silent (docs/decisions/0015). Its batch norms do: they keep the mean and variance of every
channel over the training images, and an image of another domain has means that none of those had.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pleas.settings import Heads
from pleas.symmetry import logits_of

SHARPNESS = 2.0  # shares fall with this power of the distance
FOREIGN = 4.0  # times a parent's typical distance: what fits worse is another domain's
OVERRULED = 0.5  # of a parent's images on which the parents' mean keeps its answer: fewer is a contradiction
TINY = 1e-12
NO_DOMAINS = (
    'targets = "own" reads from batch norms whose image a proxy is, and a parent has none: set it to "mean"'
)

_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Domains:
    """Every parent's answers to all proxies, and how far these are from what it was trained on.

    distances: (images, parents), see `distance_of`    outputs: every parent's, (images, K_p); (images, 0) where
    they are no row of numbers an image
    names: of the parents
    """

    distances: Tensor
    outputs: tuple[Tensor, ...]
    names: tuple[str, ...]

    @property
    def typical(self) -> Tensor:
        return typical_distances(self.distances)

    @property
    def shares(self) -> Tensor:
        """(images, parents), see `shares_of`."""
        return shares_of(self.distances, self.typical)

    @property
    def owners(self) -> Tensor:
        """(images,), the parent that each image fits best."""
        return self.shares.argmax(1)

    def differ(self, heads: Heads) -> bool:
        """Whether every parent is to be followed on its own images only: those of one are foreign to another, and, with
        one head for all, it outvotes the one there."""
        if heads == "shared":
            return bool(self.contradictions)
        relative, owners = self.distances / self.typical.clamp_min(TINY), self.owners
        parents = range(len(self.names))
        return any(
            float(relative[owners == parent, other].median()) > FOREIGN
            for parent in parents
            for other in parents
            if other != parent and bool((owners == parent).any())
        )

    @property
    def contradictions(self) -> tuple[Contradiction, ...]:
        """Parents whose own images are another domain's to a parent that nevertheless outvotes them there."""
        if len({output.shape[1:] for output in self.outputs}) > 1 or not self.outputs[0].shape[1]:
            return ()
        relative, owners = self.distances / self.typical.clamp_min(TINY), self.owners
        found = []
        for parent, name in enumerate(self.names):
            own = owners == parent
            if not bool(own.any()):
                continue
            mean = torch.stack([output[own] for output in self.outputs]).mean(0)
            kept = float((mean.argmax(1) == self.outputs[parent][own].argmax(1)).float().mean())
            for other, stranger in enumerate(self.names):
                misfit = float(relative[own, other].median())
                if other != parent and misfit > FOREIGN and kept < OVERRULED:
                    agree = self.outputs[other][own].argmax(1) == self.outputs[parent][own].argmax(1)
                    found.append(Contradiction(name, stranger, float(agree.float().mean()), kept, misfit))
        return tuple(found)


@dataclass(frozen=True)
class Contradiction:
    """On images of `parent`, `stranger` says something else, and so does the mean of all parents.

    agreement: share of these images on which the two choose one class    kept: on which the mean and the parent do
    misfit:    how far they are from what the stranger knows, in its typical distances
    """

    parent: str
    stranger: str
    agreement: float
    kept: float
    misfit: float

    def __str__(self) -> str:
        return (
            f"parents contradict each other on each other's proxies: on those of {self.parent}, {self.stranger} agrees "
            f"with it on {100 * self.agreement:.0f} % and the mean of the parents on {100 * self.kept:.0f} %, though "
            f"they are {self.misfit:.0f} times as far from what {self.stranger} knows as its own"
        )


@torch.no_grad()
def look(
    networks: Sequence[nn.Module], inputs: Iterable[Sequence[Tensor]], names: Sequence[str]
) -> Domains | None:
    """One pass of all parents over the proxies; None where one has no batch norm, so that nothing tells its domain.

    inputs: batches, each as every network takes it
    """
    if not all(any(_norms(network)) for network in networks):
        return None
    distances: list[Tensor] = []
    outputs: list[list[Tensor]] = [[] for _ in networks]
    for batch in inputs:
        networks = [_placed(network, batch[0].device) for network in networks]
        found = [answer_and_distance(network, x) for network, x in zip(networks, batch, strict=True)]
        distances.append(torch.stack([distance for _, distance in found], 1).cpu())
        for own, (answer, _) in zip(outputs, found, strict=True):
            own.append(
                answer.float().cpu() if answer.dim() == 2 else answer.new_empty((len(answer), 0)).cpu()
            )
    return Domains(torch.cat(distances), tuple(torch.cat(own) for own in outputs), tuple(names))


def _placed(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, or a copy of it, on `device`."""
    home = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), device)
    return network if home == device else copy.deepcopy(network).to(device)


def answer_and_distance(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """A network's outputs, and how far each image is from what its batch norms remember, (N,) float32.

    With m the mean of a channel over the positions of one image, and mu and var what the batch norm stores, it is the
    mean over layers and channels of (m - mu)^2 / var.
    """
    with _listening(network) as terms:
        output = logits_of(network(images))
    assert output is not None
    return output, torch.stack(terms).mean(0)


@contextmanager
def _listening(network: nn.Module) -> Iterator[list[Tensor]]:
    terms: list[Tensor] = []

    def listen(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        value = inputs[0].float()
        mean = value.flatten(2).mean(2) if value.dim() > 2 else value
        terms.append(((mean - norm.running_mean).square() / (norm.running_var + norm.eps)).mean(1))

    handles = [norm.register_forward_pre_hook(listen) for norm in _norms(network)]
    try:
        yield terms
    finally:
        for handle in handles:
            handle.remove()


def _norms(network: nn.Module) -> Iterator[nn.Module]:
    """Batch norms that remember statistics."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield module


def typical_distances(distances: Tensor) -> Tensor:
    """(parents,) how far a parent's own images are from it, of (images, parents).

    An even part of the images is taken to be each parent's, those that fit it best, and the middle one of them tells.
    """
    return distances.quantile(0.5 / distances.shape[1], 0)


def shares_of(distances: Tensor, typical: Tensor) -> Tensor:
    """(images, parents) how much each parent counts in an image, 1 in all: a power of typical over found distance."""
    fit = SHARPNESS * (typical.clamp_min(TINY).log() - distances.clamp_min(TINY).log())
    return fit.softmax(1)


def uneven(shares: Tensor | None) -> Tensor | None:
    """The shares, or None where all parents count alike in every image."""
    return None if shares is None or bool((shares == shares[:, :1]).all()) else shares
