"""`datafree.merge` and `datafree.refine`: networks in memory become one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import pleas
from datafree.artefact.save import save
from datafree.errors import UsageError
from datafree.evaluation.results import Point
from datafree.library.frames import frame_of
from datafree.library.images import AsTheyAre, Images
from datafree.library.networks import Network, Networks, Prepared, take_networks
from datafree.library.proxies import COUNT, given_images, images_for
from datafree.library.quiet import Said, checked, shown, undisturbed
from datafree.progress import StageProgress
from datafree.recipe.schema import RefineSpec
from datafree.seeds import derive_seed
from datafree.stages.inputs import Inputs
from datafree.stages.merging import enough_rows, plan_for
from datafree.stages.parents import LoadedParents
from datafree.stages.refining import AUGMENT, EXACT
from datafree.stages.work import choose_device
from pleas.refine import Features, RefineResult, RefineSettings, Teacher
from pleas.refine import refine as distil

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Labels = Literal["shared", "separate"]
_OF_A_RECIPE = {  # keys of its refine section, and what there is here instead
    "proxies": "give refine(merged, proxies) other images",
    "fresh": "use datafree.run for it",
    "curve": "use datafree.run for it",
}


@dataclass(frozen=True, repr=False)
class MergedNetworks:
    """What `datafree.merge` gives: one merged network a budget, all from one pass of statistics.

    `merged[1.25]` is the `pleas.MergeResult` of budget 1.25, `merged[1.25].module` its network, on the CPU and in
    evaluation mode; `merged.module` is short for it where there is but one. Iterating goes through the results.

    parents:   the parents as they were merged: copies on the CPU
    evidence:  statistics and matching, from which `pleas.make_plan` and `pleas.assemble` give further budgets
    images:    the proxies
    refined:   what refining did, by budget; empty before `datafree.refine`
    notes:     what is to be said, one sentence each
    """

    results: Mapping[Point, pleas.MergeResult]
    parents: LoadedParents
    evidence: pleas.Evidence
    images: Images
    labels: Labels
    refined: Mapping[Point, RefineResult] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        points = ", ".join(point.label for point in self.results)
        return f"MergedNetworks({len(self.parents.each)} parents on {len(self.images)} images: {points})"

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[pleas.MergeResult]:
        return iter(self.results.values())

    def __getitem__(self, value: float) -> pleas.MergeResult:
        for point, result in self.results.items():
            if point.value == value:
                return result
        raise KeyError(
            f"no network was merged at {value}: there are {', '.join(p.label for p in self.results)}"
        )

    @property
    def only(self) -> pleas.MergeResult:
        """The result, where there is but one. Raises UsageError where there are several."""
        if len(self.results) != 1:
            first = next(iter(self.results)).value
            raise UsageError(
                f"{len(self.results)} networks were merged ({', '.join(p.label for p in self.results)}): choose one, "
                f"merged[{first:g}]"
            )
        return next(iter(self.results.values()))

    @property
    def module(self) -> nn.Module:
        """The merged network, where there is but one."""
        return self.only.module

    def save(self, folder: str | Path, **description: Any) -> Path:
        """As `datafree.save`, of the only network: an artefact folder that explains itself and reloads."""
        known = {"preprocess": None if isinstance(self.parents.input, AsTheyAre) else self.parents.input}
        return save(self.only, folder, **{**known, **description})

    def rows(self) -> list[dict[str, Any]]:
        """One a network. ratio: of multiply-adds to one parent's; held_out_error: squared error of the outputs on
        held-out proxies, relative to the variance of what they should be: 0 is the ensemble."""
        return [
            {
                point.kind: point.value,
                "ratio": result.ratio,
                "flops": result.flops,
                "parameters": result.parameters,
                "held_out_error": result.held_out_error,
                "mean_residual": result.mean_residual,
                "propagate": result.propagate,
                "kept": self.refined[point].kept if point in self.refined else None,
            }
            for point, result in self.results.items()
        ]

    def to_frame(self) -> Any:
        """`rows()` as a pandas.DataFrame. Raises UsageError where pandas is not installed."""
        return frame_of(self.rows())

    def plot(self) -> Figure:
        """Held-out error against multiply-adds, as a matplotlib figure; 0 is the ensemble."""
        from datafree.library.pictures import curves

        known = [one for one in self if one.held_out_error is not None]
        errors = [float(one.held_out_error or 0) for one in known]
        return curves([("merged", [one.ratio for one in known], errors)], [], "error on held-out proxies")


def merge(
    parents: Networks,
    proxies: Any = "inversion",
    *,
    budget: float | Sequence[float] | None = None,
    budgets: Sequence[float] | None = None,
    apart: float | Sequence[float] | None = None,
    count: int | None = None,
    preprocess: Prepared | Mapping[str, Prepared] = None,
    labels: Labels = "shared",
    base: Network | None = None,
    refine: int | Mapping[str, Any] | RefineSpec | None = None,
    settings: pleas.MergeSettings | None = None,
    batch: int = 64,
    device: str = "auto",
    seed: int = 0,
    progress: Said = False,
) -> MergedNetworks:
    """Merge trained networks of one architecture into one, without the data they were trained on.

    Permutations and least squares (PLeaS, arXiv 2407.02447) in closed form, every layer solved on what the merged
    network feeds it, on proxies: images inverted from the parents, or images you have.

    parents:    two to 16 modules, in a list or a mapping by name. They are copied; modes, buffers and device stay
    proxies:    "inversion" (or another kind of a recipe's proxy.sources, or its section `{"kind": ...}`), or images: a
                tensor (N, C, H, W), a list of PIL images, a DataLoader of x, (x, y) or mappings, what `datafree.invert`
                gave. uint8 are pixels from 0 to 255, which `preprocess` makes inputs of; floats are inputs, normalised
    budget, budgets: multiply-adds of the result relative to one parent, 1.0 (an ordinary network of the parents' class)
                to the number of parents (their ensemble); or apart: fraction of all units kept apart, 0 to 1
    count:      how many proxies are made (512 by default), or taken of those given, the first ones (all by default)
    preprocess: size in pixels, mean and std for pixels from 0 to 1, as `{"size": 32, "mean": [...], "std": [...]}`, for
                all parents or by name; timm's models and artefacts say it themselves, and normalised images need none
    labels:     "shared": output i is the same class in all parents; "separate": the result has one head a parent
    base:       the network that all parents were fine-tuned from, if there is one: units then stay in place unless
                moving them clearly helps. It is no parent; its head may have another number of outputs
    refine:     steps, or keys of a recipe's refine section such as `{"minutes": 5}`: see `datafree.refine`
    settings:   of `pleas.merge`; its heads and seed come from `labels` and `seed`
    batch:      images per forward pass
    device:     "auto", "cpu", "cuda" or "cuda:N", where networks run; results are on the CPU
    progress:   whether to show stages and time on standard error

    Raises the command line's exceptions: UsageError and pleas.InputError for what the caller can mend, RunError and
    pleas.MergeFailed for a run that failed although its inputs looked right.

    >>> merged = datafree.merge([a, b], torch.rand(64, 1, 8, 8), budgets=[1, 1.5])
    >>> merged
    MergedNetworks(2 parents on 64 images: budget 1, budget 1.5)
    >>> merged[1.5].module(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    place, said = choose_device(device), shown(progress)
    with said, undisturbed(place):
        spec = None if refine is None else _refine_section(refine)
        given = given_images(proxies, "proxies", count)
        seen = given if isinstance(given, Images) else None
        with said.stage("parents"):
            loaded = take_networks(parents, preprocess, seen, base)
            points = _points(budget, budgets, apart, len(loaded.each))
            chosen = replace(
                settings or pleas.MergeSettings(), heads=labels, seed=derive_seed(seed, "positions")
            )
        with said.stage("symmetry"):
            networks = trace_networks(loaded, chosen)
        if given is None:  # before the proxies are made, which takes minutes
            enough_rows(chosen, networks, COUNT if count is None else count)
        images = images_for(loaded, proxies, given, count, seed, place, said)
        enough_rows(chosen, networks, len(images))
        inputs = Inputs(images.batches, len(images), "", batch, loaded, place)
        with said.stage("statistics"):
            statistics = pleas.collect(networks, inputs, images=len(images), progress=said)
        with said.stage("matching"):
            evidence = pleas.gather(networks, inputs, statistics=statistics)
        with said.stage("plan"):
            plans = {point: plan_for(evidence, point) for point in points}
        results = {}
        with said.stage("least squares"):
            for point, plan in plans.items():
                results[point] = pleas.assemble(
                    evidence, plan, progress=lambda _, done, total, what=point.label: said(what, done, total)
                )
        notes = tuple(dict.fromkeys((*loaded.notes, *networks.notes, *evidence.notes, *images.notes)))
        merged = MergedNetworks(results, loaded, evidence, images, labels, notes=notes)
        return merged if spec is None else _refined(merged, images, spec, place, seed, said)


def refine(
    merged: MergedNetworks,
    proxies: Any = None,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    count: int | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Said = False,
    **settings: Any,
) -> MergedNetworks:
    """Distil all parents into every merged network, on proxies alone; kept only where it helps beyond chance.

    merged:   what `datafree.merge` gave; it stays as it is
    proxies:  images as for `merge`, of the parents' input; those of the merge by default. 192 images at the least with
              the default batch of 64: some are held out to judge the result
    steps, minutes: how long every network is trained; 500 steps where neither is said
    settings: further keys of a recipe's refine section: batch, rate, feature_weight, augment, ...
    Returns the networks with what was kept, and under `refined` the evidence, by budget. Raises UsageError and
    pleas.InputError for what the caller can mend.

    >>> merged = datafree.merge([a, b], torch.rand(128, 1, 8, 8))
    >>> better = datafree.refine(merged, steps=2)
    >>> [one.kept in ("refined", "start") for one in better.refined.values()]
    [True]
    """
    if not isinstance(merged, MergedNetworks):
        raise UsageError(f"refine takes what datafree.merge gave, not a {type(merged).__name__}")
    given = {**settings, "steps": steps, "minutes": minutes}
    spec = _refine_section({key: value for key, value in given.items() if value is not None})
    place, said = choose_device(device), shown(progress)
    with said, undisturbed(place):
        images = merged.images
        if proxies is not None:
            taken = given_images(proxies, "proxies", count)
            images = images_for(merged.parents, proxies, taken, count, seed, place, said)
            if images.are_pixels == isinstance(merged.parents.input, AsTheyAre):
                wanted = "normalised inputs (floats)" if images.are_pixels else "pixels (uint8)"
                raise UsageError(f"the merge was made from {wanted}: give refine the same kind of images")
        return _refined(merged, images, spec, place, seed, said)


def trace_networks(loaded: LoadedParents, settings: pleas.MergeSettings) -> pleas.Parents:
    if settings.heads == "union":
        raise UsageError(
            "labels='union' joins classes by name, and networks bring no names: use a recipe with `labels: union`, or "
            "pleas.merge with MergeSettings(heads='union', outputs=...)"
        )
    return pleas.Parents.of(
        [parent.module for parent in loaded.each],
        loaded.example,
        settings,
        names=loaded.names,
        base=None if loaded.base is None else loaded.base.module,
    )


def _points(budget: Any, budgets: Any, apart: Any, parents: int) -> tuple[Point, ...]:
    """The networks that are asked for; budget 1.0 where nothing is said."""
    said = {"budget": budget, "budgets": budgets, "apart": apart}
    names = [name for name, value in said.items() if value is not None]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} are given together: give one of them")
    name = names[0] if names else "budget"
    value = said[name] if names else 1.0
    listed = list(value) if isinstance(value, Sequence | Tensor) and not isinstance(value, str) else [value]
    kind: Literal["budget", "apart"] = "apart" if name == "apart" else "budget"
    low, high = (0, 1) if kind == "apart" else (1, parents)
    if not listed or len(set(listed)) < len(listed):
        raise UsageError(f"{name}={value!r}: give at least one number, each once")
    for one in listed:
        if isinstance(one, bool) or not isinstance(one, int | float) or not low <= one <= high:
            meaning = "0 fuses all units, 1 none" if kind == "apart" else f"{parents} is the ensemble"
            raise UsageError(f"{name}={value!r}: {one!r} is no number from {low} to {high} ({meaning})")
    return tuple(Point(kind, float(one)) for one in listed)


def _refine_section(given: Any) -> RefineSpec:
    if isinstance(given, int) and not isinstance(given, bool):
        given = {"steps": given}
    if isinstance(given, Mapping):
        unused = [key for key in _OF_A_RECIPE if given.get(key)]
        if unused:
            raise UsageError(f"refine: {unused[0]} belongs to a recipe: {_OF_A_RECIPE[unused[0]]}")
    elif not isinstance(given, RefineSpec):
        raise UsageError(f"refine={given!r}: give steps, or keys as {{'steps': 500}} or {{'minutes': 5}}")
    return checked(RefineSpec, given, "refine")


def _refined(
    merged: MergedNetworks,
    images: Images,
    spec: RefineSpec,
    device: torch.device,
    seed: int,
    progress: StageProgress,
) -> MergedNetworks:
    chosen = spec.model_dump(exclude={"augment", *_OF_A_RECIPE})
    settings = RefineSettings(**chosen, seed=derive_seed(seed, "refine"))
    pixels, back = images.in_eight_bits()
    normalise = back or merged.parents.input
    teachers = [
        Teacher(parent.name, parent.module, back or parent.preprocess) for parent in merged.parents.each
    ]
    results, told, notes = dict(merged.results), {}, list(merged.notes)
    with progress.stage("refine"):
        for point, result in merged.results.items():
            if result.mean_residual < EXACT:
                notes.append(f"{point.label}: it already computes what its parents do: nothing to refine")
                continue
            found = distil(
                result.module,
                teachers,
                pixels,
                settings,
                normalise=normalise,
                heads=merged.labels,
                augment=AUGMENT[spec.augment],
                features=Features(merged.evidence, result.plan) if settings.feature_weight else None,
                groups=list(images.sources) or None,
                device=device,
                progress=lambda text, done, total, what=point.label: progress(f"{what}: {text}", done, total),
            )
            results[point], told[point] = replace(result, module=found.module), found
            notes += [f"{point.label}: {note}" for note in found.notes]
    return replace(merged, results=results, refined=told, notes=tuple(dict.fromkeys(notes)))
