"""Several parents become one network: `merge`, the door to the stages behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

from torch import Tensor, nn

from pleas.assemble import MergeResult, assemble
from pleas.errors import InputError
from pleas.evidence import gather
from pleas.parents import Parents
from pleas.plan.plan import make_plan
from pleas.settings import MergeSettings
from pleas.statistics.collect import Batch, Progress

DEFAULTS = MergeSettings()


@overload
def merge(
    parents: Sequence[nn.Module],
    inputs: Iterable[Batch],
    /,
    *,
    budget: float | None = None,
    apart: float | None = None,
    settings: MergeSettings = DEFAULTS,
    example: Tensor | None = None,
    base: nn.Module | None = None,
    progress: Progress | None = None,
) -> MergeResult: ...
@overload
def merge(
    a: nn.Module,
    b: nn.Module,
    inputs: Iterable[Batch],
    /,
    *,
    budget: float | None = None,
    apart: float | None = None,
    settings: MergeSettings = DEFAULTS,
    example: Tensor | None = None,
    base: nn.Module | None = None,
    progress: Progress | None = None,
) -> MergeResult: ...
def merge(
    *networks_and_inputs,
    budget: float | None = None,
    apart: float | None = None,
    settings: MergeSettings = DEFAULTS,
    example: Tensor | None = None,
    base: nn.Module | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge networks of one architecture on proxy inputs: `merge([a, b, c], inputs)` or `merge(a, b, inputs)`.

    Permutations and least squares (PLeaS, arXiv 2407.02447), in closed form, every layer solved on what the merged
    network feeds it.

    inputs:  a collection of batches of normalised images (N, C, H, W); of tuples with one such batch for each parent
             where they normalise differently
    budget:  multiply-adds of the result relative to one parent, from 1.0 to the number of parents; or
    apart:   fraction of the units of every class kept apart, 0 to 1
    base:    the network that all of them were fine-tuned from: units then stay in place unless moving clearly helps
    For several budgets call the stages (`Parents.of`, `gather`, `make_plan`, `assemble`): one pass of statistics
    serves them all. Raises InputError and its subclasses for what the caller can mend, MergeFailed otherwise.
    """
    modules, inputs = _taken_apart(networks_and_inputs)
    if not hasattr(inputs, "__len__") and iter(inputs) is inputs:
        raise InputError(
            "inputs is a one-shot iterator; give a list of batches or a DataLoader: "
            "it is read once for the statistics and once for the solve"
        )
    if example is None:
        first = next(iter(inputs), None)
        if first is None:
            raise InputError("no proxy images: inputs is empty. Give at least one batch (N, C, H, W)")
        example = (first if isinstance(first, Tensor) else first[0])[:2]
    parents = Parents.of(modules, example, settings, base=base)
    evidence = gather(parents, inputs, progress=progress)
    return assemble(evidence, make_plan(evidence, budget=budget, apart=apart), progress=progress)


def _taken_apart(given: Sequence[object]) -> tuple[list[nn.Module], Iterable[Batch]]:
    """The networks, and the batches after them."""
    if len(given) == 2 and isinstance(given[0], Sequence):
        modules, inputs = list(given[0]), given[1]
    else:
        *modules, inputs = given if given else (None,)
    wrong = [type(x).__name__ for x in modules if not isinstance(x, nn.Module)]
    if len(given) < 2 or inputs is None or isinstance(inputs, nn.Module):
        wrong.append("no batches")
    if wrong:
        raise InputError(
            "merge takes networks and then batches of images, as merge([a, b], batches) or merge(a, b, batches); it "
            f"got {', '.join(wrong)}"
        )
    if isinstance(inputs, Tensor):
        raise InputError(
            f"inputs is one tensor of shape {tuple(inputs.shape)}: give a list of batches, for example "
            "list(images.split(64))"
        )
    return modules, inputs  # type: ignore[return-value]
