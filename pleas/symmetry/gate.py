"""The numeric gate: does a random permutation of every class leave the output unchanged?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn

from pleas.errors import GateFailed
from pleas.symmetry.apply import Permutation, permute_tensor, position_maps, random
from pleas.symmetry.copies import device_of, evaluation_copy, unwrap
from pleas.symmetry.groups import Symmetry, coupled
from pleas.symmetry.program import execute, logits_of, state_of
from pleas.symmetry.undisturbed import same_random_state

GATE_TOLERANCE = 1e-9  # relative, in float64; correct permutations give about 1e-15
SINGLE_PRECISION = 1e-5  # what a cast to float32 inside the module may cost
HALF_PRECISION = 0.05  # the same for bfloat16 and float16
HALVES = (torch.float16, torch.bfloat16)
JITTERS = (
    0.3,
    0.05,
)  # relative noise on the weights; the smaller one where the larger makes a network chaotic


def check_gate(symmetry: Symmetry, model: nn.Module, example: Tensor, seed: int = 0) -> float:
    """Relative difference, in float64, between the module and the program run on permuted weights.

    Raises GateFailed above 1e-9, naming a class that does not hold, or the export if it is to blame.
    """
    return run_gate(symmetry, model, example, seed)[0]


def run_gate(
    symmetry: Symmetry, model: nn.Module, example: Tensor, seed: int = 0
) -> tuple[float, tuple[str, ...]]:
    """What `check_gate` gives, and what is to be said about it.

    The weights are jittered first, so that zero biases and equal batch norms hide nothing. Comparing the module
    itself with the program covers the export, too. A network whose activations explode on jittered weights blows up
    rounding errors as well: where even the untouched program misses the module, the jitter is made smaller once.
    A forward that insists on a precision (`.float()`, autocast) is compared with its program in the model's own
    precision, and the permutations in float64 on the program, without its casts.
    """
    generator = torch.Generator().manual_seed(seed)
    model = unwrap(model)
    with same_random_state(model):
        gate = _Gate(symmetry, model, example, generator, JITTERS[0])
        permutation = random(symmetry, generator)
        error = gate.error(permutation)
        if not error < GATE_TOLERANCE and not gate.error(None) < GATE_TOLERANCE:
            gate = _Gate(symmetry, model, example, generator, JITTERS[1])
            error = gate.error(permutation)
        if GATE_TOLERANCE <= error < SINGLE_PRECISION:
            gate.ignore_casts()
            error = gate.error(permutation)
        if not error < GATE_TOLERANCE:
            raise GateFailed(gate.diagnose(error, generator))
    return error, gate.notes


class _Gate:
    """A jittered float64 copy of the model, its output, and the change of it under permutations."""

    @torch.no_grad()
    def __init__(
        self,
        symmetry: Symmetry,
        model: nn.Module,
        example: Tensor,
        generator: torch.Generator,
        jitter: float,
    ) -> None:
        self.symmetry, self.owner = symmetry, type(model).__name__
        self.graph, self.notes = symmetry.program.graph, ()
        program = symmetry.program
        module = evaluation_copy(model, share=False).to(torch.float64)
        _jitter(module, generator, jitter)
        shape = (program.batch or 1, *example.shape[1:])
        self.images = torch.randn(shape, generator=generator).to(device_of(model), torch.float64)
        state = state_of(program, module)
        self.state = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
        try:
            self.expected = _logits(module, self.images)
        except (RuntimeError, TypeError):  # float32 meets float64
            self._compare_in_own_precision(evaluation_copy(model, share=False), example.dtype)

    def _compare_in_own_precision(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Module against program in the precision the model is made for; from here on, the program without casts."""
        program = self.symmetry.program
        module.load_state_dict(
            {n: t for n, t in self.state.items() if n in module.state_dict()}, strict=False
        )
        images = self.images.to(dtype)
        expected = _logits(module, images).double()
        found = execute(program.graph, [state_of(program, module)], [images])[0].double()
        error = _relative(found, expected)
        halves = any(getattr(n.meta.get("val"), "dtype", None) in HALVES for n in program.graph.nodes)
        if not error < (HALF_PRECISION if halves else SINGLE_PRECISION * 100):
            raise GateFailed(
                f"the exported graph of {self.owner} does not compute what the module computes: relative difference "
                f"{error:.1e} in {str(dtype).removeprefix('torch.')}, in which its forward insists to be run."
            )
        self.graph = _without_casts(program.graph)
        self.expected = self._run(self.state)
        self.notes = (
            f"The forward of {self.owner} fixes its precision (a cast or autocast): it was compared with its graph in "
            f"{str(dtype).removeprefix('torch.')} (relative difference {error:.1e}), the permutations in float64 "
            "without the casts.",
        )

    def error(self, permutation: Permutation | None) -> float:
        """Relative difference of the output on permuted (None: untouched) weights."""
        state = self.state if permutation is None else _Permuted(self.symmetry, self.state, permutation)
        output = self._run(state)
        return _relative(output, self.expected)

    def ignore_casts(self) -> None:
        """Compare with the untouched program where the module itself casts to single precision inside."""
        if self.error(None) < SINGLE_PRECISION:
            self.expected = self._run(self.state)

    def _run(self, state: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return execute(self.graph, [state], [self.images])[0]

    def diagnose(self, error: float, generator: torch.Generator) -> str:
        """Blame the export, or one class whose permutation alone changes the output, found by bisection."""
        untouched = self.error(None)
        if not untouched < GATE_TOLERANCE:
            return (
                f"the exported graph of {self.owner} does not compute what the module computes: relative difference "
                f"{untouched:.1e} in float64. Usually the forward depends on more than its parameters (a cache filled "
                "by an earlier call, random numbers), or casts to a fixed precision."
            )
        suspects = [k for k in range(len(self.symmetry.classes)) if k not in self.symmetry.output]
        while len(suspects) > 1:
            half = suspects[: len(suspects) // 2]
            broken = not self.error(random(self.symmetry, generator, half)) < GATE_TOLERANCE
            suspects = half if broken else suspects[len(half) :]
        cls = self.symmetry.classes[suspects[0]]
        return (
            f"permuting class {cls.name} of {self.owner} ({cls.size} units: {coupled(cls, self.symmetry.shapes)}) "
            f"changes the output: relative difference {error:.1e} in float64 with all classes permuted, where "
            f"{GATE_TOLERANCE:.0e} is allowed. The symmetry rule of an op between these parameters is wrong; please "
            "report the model."
        )


class _Permuted(Mapping[str, Tensor]):
    """A permuted state, one tensor at a time, so that it takes no memory of its own."""

    def __init__(self, symmetry: Symmetry, state: Mapping[str, Tensor], permutation: Permutation) -> None:
        self.symmetry, self.state, self.maps = symmetry, state, position_maps(symmetry, permutation)

    def __getitem__(self, name: str) -> Tensor:
        return permute_tensor(self.symmetry, self.maps, name, self.state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def _logits(module: nn.Module, images: Tensor) -> Tensor:
    found = logits_of(module(images.clone()))
    assert found is not None, "the export checked that there are logits"
    return found


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-300)


def _without_casts(graph: fx.Graph) -> fx.Graph:
    """A copy whose ops give floating-point values in the precision of the images, which `execute` follows."""
    ours = copy.deepcopy(graph)
    exported = next(node.meta["val"].dtype for node in ours.nodes if node.op == "placeholder")
    for node in ours.nodes:
        dtype = node.kwargs.get("dtype")
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            node.kwargs = {**node.kwargs, "dtype": exported}
    return ours


def _jitter(module: nn.Module, generator: torch.Generator, amount: float) -> None:
    """Noise of this relative size on every weight and running statistic (in place); other buffers are left alone."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        statistic = name.endswith(("running_mean", "running_var"))
        if not tensor.is_floating_point() or not (isinstance(tensor, nn.Parameter) or statistic):
            continue
        noise = torch.randn(tensor.shape, generator=generator).to(
            tensor
        )  # drawn on the CPU: the same everywhere
        if name.endswith("running_var"):
            tensor.mul_(torch.exp(amount * noise))
        else:
            size = float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
            tensor.add_((amount * size if size > 1e-3 else 0.1) * noise)
