"""Permutations of units: on position indices, on state dicts, and the numeric gate."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pleas.errors import GateFailed
from pleas.symmetry.groups import Symmetry, UnitClass, coupled
from pleas.symmetry.program import execute, logits_of, state_of

GATE_TOLERANCE = 1e-9  # relative, in float64; correct permutations give about 1e-15


@dataclass(frozen=True)
class UnitPermutation:
    """perm[u] is the unit of B that takes place u of A; children[u] permutes inside that place, per inner class."""

    perm: Tensor
    children: tuple[tuple[UnitPermutation, ...], ...] = ()


Permutation = tuple[UnitPermutation, ...]  # one for each top-level class


def identity(symmetry: Symmetry) -> Permutation:
    """The permutation that leaves everything in place."""
    return tuple(_draw(cls, None) for cls in symmetry.classes)


def random(symmetry: Symmetry, generator: torch.Generator, only: Sequence[int] | None = None) -> Permutation:
    """A random permutation of every class, inner classes included; classes of the output stay in place.

    only: indices of the classes to permute (all but the output by default).
    """
    chosen = set(range(len(symmetry.classes))) - set(symmetry.output) if only is None else set(only)
    return tuple(_draw(cls, generator if k in chosen else None) for k, cls in enumerate(symmetry.classes))


def _draw(cls: UnitClass, generator: torch.Generator | None) -> UnitPermutation:
    perm = torch.arange(cls.size) if generator is None else torch.randperm(cls.size, generator=generator)
    return UnitPermutation(perm, tuple(tuple(_draw(c, generator) for c in inner) for inner in cls.children))


def position_maps(symmetry: Symmetry, permutation: Permutation) -> dict[tuple[str, int], Tensor]:
    """(tensor, dim) -> map with aligned_b = b.index_select(dim, map); axes that stay in place are left out.

    For dim 1 of a grouped convolution's weight the map is over the virtual axis of all channels.
    """
    maps: dict[tuple[str, int], Tensor] = {}
    for cls, part in zip(symmetry.classes, permutation, strict=True):
        _fill(symmetry, maps, cls, cls, part)
    return {key: m for key, m in maps.items() if not torch.equal(m, torch.arange(len(m)))}


def _fill(
    symmetry: Symmetry,
    maps: dict[tuple[str, int], Tensor],
    place: UnitClass,
    source: UnitClass,
    permutation: UnitPermutation,
) -> None:
    """`place` is a class as it stands in A, `source` the same class in the unit of B that comes there."""
    for here, there in zip(place.axes, source.axes, strict=True):
        key = (here.tensor, here.dim)
        if key not in maps:
            maps[key] = torch.arange(len(symmetry.axis(*key).cls))
        maps[key][here.index] = there.index[permutation.perm]
    for u, inner in enumerate(permutation.children):
        origin = source.children[int(permutation.perm[u])]
        for a, b, part in zip(place.children[u], origin, inner, strict=True):
            _fill(symmetry, maps, a, b, part)


def permute_state(
    symmetry: Symmetry, state: Mapping[str, Tensor], permutation: Permutation
) -> dict[str, Tensor]:
    """A state dict of the same function with its units permuted; tensors that stay in place are shared."""
    maps = position_maps(symmetry, permutation)
    by_tensor: dict[str, dict[int, Tensor]] = {}
    for (name, dim), places in maps.items():
        by_tensor.setdefault(name, {})[dim] = places
    result = dict(state)
    for name in state:
        dims = by_tensor.get(symmetry.program.tied.get(name, name), {})
        groups = symmetry.groups.get(symmetry.program.tied.get(name, name), 1)
        for dim, places in sorted(dims.items(), reverse=True):
            if dim == 1 and groups > 1:
                result[name] = _gather_grouped(result[name], places, dims.get(0), groups)
            else:
                result[name] = result[name].index_select(dim, places.to(result[name].device))
    return result


def _gather_grouped(weight: Tensor, places: Tensor, rows: Tensor | None, groups: int) -> Tensor:
    """Permute the inner axis of a grouped weight, rows still in B's order.

    A whole group of B comes to one place; its rows keep their own inner order until rows are permuted, so the
    inner map of a row is that of the group its row will stand in.
    """
    inner, per_group = weight.shape[1], weight.shape[0] // groups
    within = places.reshape(groups, inner) % inner  # place group, place index -> index within B's group
    origin = places.reshape(groups, inner)[:, 0] // inner  # place group -> B's group
    order = torch.empty_like(within)
    order[origin] = within
    index = order.repeat_interleave(per_group, 0).reshape(*weight.shape[:2], *(1,) * (weight.dim() - 2))
    return weight.gather(1, index.to(weight.device).expand(weight.shape))


# the gate ----------------------------------------------------------------------------------------------------


def check_gate(symmetry: Symmetry, model: nn.Module, example: Tensor, seed: int = 0) -> float:
    """Relative change of the output under a random permutation of every class, in float64.

    Runs a copy of the module itself where possible; where a rewrite added parameters, the program, after checking
    that it computes what the module computes. The copy's weights are jittered, so that zero biases and equal batch
    norms hide nothing. Raises GateFailed above 1e-9, naming a class that does not hold.
    """
    generator = torch.Generator().manual_seed(seed)
    gate = _Gate(symmetry, model, example, generator)
    permutation = random(symmetry, generator)
    error = gate.error(permutation)
    if not error < GATE_TOLERANCE:
        raise GateFailed(gate.diagnose(error, generator))
    return error


class _Gate:
    """A jittered float64 copy of the model, its output, and the change of it under permutations."""

    def __init__(
        self, symmetry: Symmetry, model: nn.Module, example: Tensor, generator: torch.Generator
    ) -> None:
        self.symmetry = symmetry
        self.module = copy.deepcopy(model).train().eval().to(torch.float64)
        program = symmetry.program
        rows = program.batch or 2
        self.images = torch.randn((rows, *example.shape[1:]), generator=generator).to(torch.float64)
        _jitter(self.module, generator)
        self.state = {
            name: t.double() if t.is_floating_point() else t
            for name, t in state_of(program, self.module).items()
        }
        self.expected = self._run_module()
        self.scale = float(self.expected.abs().max())
        error = self._relative(self._run_program(self.state))
        if not error < GATE_TOLERANCE:
            raise GateFailed(
                f"the exported graph of {type(model).__name__} does not compute what the module computes: relative "
                f"difference {error:.1e} in float64. The forward probably depends on state outside its parameters "
                "(a cache, random numbers) or casts to a fixed precision."
            )

    def error(self, permutation: Permutation) -> float:
        state = permute_state(self.symmetry, self.state, permutation)
        if self.symmetry.program.added:
            return self._relative(self._run_program(state))
        own = dict(self.module.named_parameters(remove_duplicate=False)) | dict(
            self.module.named_buffers(remove_duplicate=False)
        )
        kept = {name: own[name].data for name in state if name in own}
        for name in kept:
            own[name].data = state[name]
        try:
            return self._relative(self._run_module())
        finally:
            for name, data in kept.items():
                own[name].data = data

    def diagnose(self, error: float, generator: torch.Generator) -> str:
        """Name one class whose permutation alone changes the output, found by bisection."""
        suspects = [k for k in range(len(self.symmetry.classes)) if k not in self.symmetry.output]
        while len(suspects) > 1:
            half = suspects[: len(suspects) // 2]
            broken = not self.error(random(self.symmetry, generator, half)) < GATE_TOLERANCE
            suspects = half if broken else suspects[len(half) :]
        cls = self.symmetry.classes[suspects[0]]
        return (
            f"permuting class {cls.name} ({cls.size} units: {coupled(cls, self.symmetry.shapes)}) changes the output: "
            f"relative difference {error:.1e} in float64 for all classes together, where 1e-9 is allowed. A symmetry "
            "rule is wrong for an op between these parameters; please report the model."
        )

    @torch.no_grad()
    def _run_module(self) -> Tensor:
        output = logits_of(self.module(self.images.clone()))
        assert output is not None
        return output

    @torch.no_grad()
    def _run_program(self, state: Mapping[str, Tensor]) -> Tensor:
        return execute(self.symmetry.program.graph, [state], [self.images])[0]

    def _relative(self, output: Tensor) -> float:
        return float((output - self.expected).abs().max()) / max(self.scale, 1e-300)


def _jitter(module: nn.Module, generator: torch.Generator) -> None:
    """Random relative noise on every weight and statistic (in place); constants among the buffers are left alone."""
    statistics = {n for n, _ in module.named_buffers() if n.endswith(("running_mean", "running_var"))}
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point() or (
                not isinstance(tensor, nn.Parameter) and name not in statistics
            ):
                continue
            size = float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            if name in statistics and name.endswith("running_var"):
                tensor.mul_(torch.exp(0.3 * noise))
            else:
                tensor.add_((0.3 * size if size > 1e-3 else 0.1) * noise)
