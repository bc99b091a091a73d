"""`datafree.evaluate` and `datafree.diagnose`: how good networks are on labelled images, and proxies without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import pleas
from datafree.artefact.load import Artefact
from datafree.diagnosis.diagnose import Reference, SourceDiagnosis, examine
from datafree.diagnosis.ranking import Place, Scores, light, ranking
from datafree.errors import UsageError
from datafree.evaluation.evaluate import Task, check_tasks, parent_columns
from datafree.evaluation.evaluate import evaluate as score
from datafree.evaluation.results import Row, row_values
from datafree.images.image_set import ImageSet
from datafree.library.frames import frame_of
from datafree.library.images import AsTheyAre, Images, take_labelled
from datafree.library.merging import Labels, MergedNetworks, trace_networks
from datafree.library.networks import Network, Networks, Prepared, take_networks
from datafree.library.proxies import given_images, images_for
from datafree.library.quiet import Said, shown, undisturbed
from datafree.models.parent import Parent
from datafree.seeds import derive_seed
from datafree.stages.judging import AllParents
from datafree.stages.parents import LoadedParents
from datafree.stages.work import choose_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Evaluated:
    """Every network on every task: what `datafree.evaluate` gives. Accuracies are fractions between 0 and 1.

    scores: one `Row` a network; `.evaluation.score(task)` has the accuracy per class and the agreement with parents
    """

    scores: tuple[Row, ...]
    tasks: tuple[str, ...]

    def __repr__(self) -> str:
        best = max(self.scores, key=lambda row: row.evaluation.average or 0.0)
        return (
            f"Evaluated({len(self.scores)} networks on {', '.join(self.tasks)}: {best.label} is best, "
            f"{best.evaluation.average or 0.0:.3f})"
        )

    def __getitem__(self, label: str) -> Row:
        for row in self.scores:
            if label in (row.label, row.name, row.title):
                return row
        raise KeyError(f"there is no {label!r}: there are {', '.join(row.label for row in self.scores)}")

    def rows(self) -> list[dict[str, Any]]:
        """One a network: its label, accuracy by task, their average, joint (among the labels of all heads), cost."""
        return [row_values(row, self.tasks) for row in self.scores]

    def to_frame(self) -> Any:
        """`rows()` as a pandas.DataFrame. Raises UsageError where pandas is not installed."""
        return frame_of(self.rows())

    def plot(self) -> Figure:
        """Accuracy against multiply-adds (the merged networks as a line), as a matplotlib figure."""
        return accuracy_figure(self.scores)


def accuracy_figure(rows: Sequence[Row]) -> Figure:
    """Task average against multiply-adds: what was merged as lines, parents and ensemble as levels."""
    from datafree.library.pictures import bars, curves

    known = [row for row in rows if row.evaluation.average is not None]
    lines = []
    for kind in ("merged", "refined", "oracle"):
        own = [row for row in known if row.kind == kind]
        if own:
            lines.append(
                (kind, [row.ratio for row in own], [100 * (row.evaluation.average or 0) for row in own])
            )
    if not lines:
        values = [100 * (row.evaluation.average or 0) for row in known]
        return bars([row.label for row in known], values, "accuracy, %")
    levels = [row for row in known if row.kind in ("parent", "ensemble", "baseline")]
    return curves(lines, [(row.label, 100 * (row.evaluation.average or 0)) for row in levels], "accuracy, %")


def evaluate(
    networks: MergedNetworks | Network | Networks,
    tasks: Any,
    *,
    labels: Labels | None = None,
    experts: Mapping[str, str] | None = None,
    preprocess: Prepared | Mapping[str, Prepared] = None,
    batch: int = 256,
    device: str = "auto",
    progress: Said = False,
) -> Evaluated:
    """Accuracy of merged networks, their parents and the ensemble; or of networks of your own.

    networks: what `merge` gave; or one network, a list, or a mapping by name, whose outputs are the same classes
    tasks:    labelled images, a pair (x, y) of tensors or a DataLoader of such pairs; a mapping by name where there are
              several. x: (N, C, H, W) uint8 pixels, or floats as the networks take them; y: (N,) whole numbers from 0
    labels:   as for `merge`, whose choice it is by default
    experts:  task -> the parent whose head answers it, with separate labels; a task called as a parent needs none
    preprocess: for networks of your own and pixels: see `merge`
    No network is changed. Raises UsageError for tasks that do not fit the networks, RunError for NaN outputs.

    >>> merged = datafree.merge([a, b], torch.rand(64, 1, 8, 8))
    >>> x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    >>> scores = datafree.evaluate(merged, (x, y))
    >>> [row.label for row in scores.scores]
    ['parent a', 'parent b', 'ensemble', 'merged, budget 1']
    """
    place, said = choose_device(device), shown(progress)
    with said, undisturbed(place):
        listed = _tasks(tasks)
        seen = next(iter(listed.values()))[0]
        if len({images.are_pixels for images, _ in listed.values()}) > 1:
            raise UsageError("some tasks hold uint8 pixels and others floats: give all of them alike")
        if isinstance(networks, MergedNetworks):
            labels = labels or networks.labels
            loaded = _as_seen(networks.parents, seen)
            return _merged_scores(networks, loaded, labels, listed, experts or {}, batch, place, said)
        if labels == "separate":
            raise UsageError("labels='separate' needs what datafree.merge gave: it knows whose head is whose")
        alone = isinstance(networks, nn.Module | Parent | Artefact)
        loaded = take_networks({"network": networks} if alone else networks, preprocess, seen)
        return _own_scores(loaded, listed, batch, place, said)


def _tasks(given: Any) -> dict[str, tuple[Images, Any]]:
    named = given if isinstance(given, Mapping) else {"images": given}
    if not named:
        raise UsageError("tasks is empty: give a pair (x, y), a DataLoader, or a mapping of them by name")
    return {str(name): take_labelled(one, f"task {name!r}") for name, one in named.items()}


def _as_seen(parents: LoadedParents, seen: Images) -> LoadedParents:
    """The parents as they take these images."""
    normalised = isinstance(parents.input, AsTheyAre)
    if seen.are_pixels:
        if normalised:
            raise UsageError(
                "the tasks hold uint8 pixels, and the merge was made from normalised inputs: normalise them likewise"
            )
        return parents
    if not parents.same_input:
        raise UsageError("the parents normalise differently: give the tasks' images as uint8 pixels")
    as_is = AsTheyAre.for_inputs(parents.input.shape)
    if tuple(seen.values.shape[1:]) != parents.input.shape:
        raise UsageError(
            f"the tasks' images are {tuple(seen.values.shape[1:])} and the networks take {parents.input.shape}"
        )
    return LoadedParents(tuple(replace(one, preprocess=as_is) for one in parents.each), as_is, parents.notes)


def _made(listed: Mapping[str, tuple[Images, Any]], experts: Mapping[str, str | None]) -> list[Task]:
    return [
        Task(name, experts.get(name), ImageSet(name, images.values.numpy(), targets), targets)
        for name, (images, targets) in listed.items()
    ]


def _merged_scores(
    merged: MergedNetworks,
    loaded: LoadedParents,
    labels: Labels,
    listed: Mapping[str, tuple[Images, Any]],
    experts: Mapping[str, str],
    batch: int,
    device: torch.device,
    progress: Any,
) -> Evaluated:
    named = {name: name for name in listed if labels == "separate" and name in loaded.names}
    unknown = sorted(set(experts) - set(listed))
    if unknown:
        raise UsageError(f"experts names task {unknown[0]!r}: the tasks are {', '.join(listed)}")
    tasks, columns = _made(listed, {**named, **experts}), loaded.columns(labels)
    check_tasks(tasks, columns)
    options: dict[str, Any] = {"batch_size": batch, "device": device, "progress": progress}
    outputs = {parent.name: parent.outputs for parent in loaded.each}
    cost = pleas.flops(loaded.first.module, loaded.example)
    rows, known = [], {}
    for parent in loaded.each:
        own = parent_columns(labels, parent.name, outputs)
        known[parent.name] = score(parent.module, tasks, parent.preprocess, own, **options)
        rows.append(Row("parent", parent.name, cost, 1.0, _parameters(parent.module), known[parent.name]))
    options["parents"] = known
    together, count = AllParents(loaded, labels), len(loaded.each)
    found = score(together, tasks, loaded.input, columns, **options)
    rows.append(Row("ensemble", "", count * cost, float(count), _parameters(together), found))
    for point, result in merged.results.items():
        found = score(result.module, tasks, loaded.input, columns, **options)
        kind = "refined" if point in merged.refined else "merged"
        error = result.held_out_error
        rows.append(
            Row(kind, "", result.flops, result.ratio, result.parameters, found, point, predicted=error)
        )
    return Evaluated(tuple(rows), tuple(listed))


def _own_scores(
    loaded: LoadedParents,
    listed: Mapping[str, tuple[Images, Any]],
    batch: int,
    device: torch.device,
    progress: Any,
) -> Evaluated:
    tasks, rows = _made(listed, {}), []
    first = pleas.flops(loaded.first.module, loaded.example)
    for parent in loaded.each:
        columns = parent_columns("shared", parent.name, {parent.name: parent.outputs})
        check_tasks(tasks, columns)
        found = score(
            parent.module,
            tasks,
            parent.preprocess,
            columns,
            batch_size=batch,
            device=device,
            progress=progress,
        )
        cost = pleas.flops(parent.module, loaded.example)
        rows.append(Row("parent", parent.name, cost, cost / first, _parameters(parent.module), found))
    return Evaluated(tuple(rows), tuple(listed))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, repr=False)
class Diagnosed:
    """How good proxies are, source by source: what `datafree.diagnose` gives.

    sources: scores of every source, by parent and layer    order: the sources, the most promising first
    """

    sources: tuple[SourceDiagnosis, ...]
    order: tuple[Place, ...]

    def __repr__(self) -> str:
        said = ", ".join(f"{one.name} {light(one.bn_log_var, one.spread)}" for one in self.sources)
        return f"Diagnosed({said})"

    def rows(self) -> list[dict[str, Any]]:
        """One a source.

        looks: good, fair or poor    bn_log_var: distance to the stored batch-norm statistics, 0 is none
        spread: entropy of the mean prediction, a share of the most there can be    agreement: of the parents' classes
        stability: share of units that two halves of the images match alike
        """
        return [
            {
                "source": one.name,
                "images": one.images,
                "looks": light(one.bn_log_var, one.spread),
                "bn_log_var": one.bn_log_var,
                "spread": one.spread,
                "effective_rank": one.effective_rank,
                "stability": one.stability,
                "agreement": one.agreement,
                "matched_as_real": one.matched_as_real,
            }
            for one in self.sources
        ]

    def to_frame(self) -> Any:
        """`rows()` as a pandas.DataFrame. Raises UsageError where pandas is not installed."""
        return frame_of(self.rows())

    def plot(self) -> Figure:
        """Spread of the predictions by source, as a matplotlib figure: more is better."""
        from datafree.library.pictures import bars

        values = [100 * one.spread for one in self.sources]
        return bars([one.name for one in self.sources], values, "spread of predictions, %")


def diagnose(
    parents: Networks,
    proxies: Any = "inversion",
    *,
    real: Any = None,
    count: int | None = None,
    preprocess: Prepared | Mapping[str, Prepared] = None,
    labels: Labels = "shared",
    batch: int = 64,
    device: str = "auto",
    seed: int = 0,
    progress: Said = False,
) -> Diagnosed:
    """How good proxies are, before anything is merged: what the parents make of them, without labels.

    parents, preprocess, labels, count, device, seed: as for `merge`
    proxies: as for `merge`; a mapping by name of several kinds of images compares and orders them
    real:    a few images of the parents' own kind, for the comparisons that need them
    No network is changed. Raises UsageError and pleas.InputError for what the caller can mend.

    >>> found = datafree.diagnose([a, b], torch.rand(32, 1, 8, 8))
    >>> [row["source"] for row in found.rows()]
    ['images']
    """
    place, said = choose_device(device), shown(progress)
    named = proxies if isinstance(proxies, Mapping) and "kind" not in proxies else {"images": proxies}
    with said, undisturbed(place):
        taken = {name: given_images(one, f"proxies {name!r}", count) for name, one in named.items()}
        if not taken:
            raise UsageError("proxies is empty: give images, or a mapping of them by name")
        seen = next((one for one in taken.values() if isinstance(one, Images)), None)
        loaded = take_networks(parents, preprocess, seen)
        networks = trace_networks(
            loaded, pleas.MergeSettings(heads=labels, seed=derive_seed(seed, "positions"))
        )
        known = None
        if real is not None:
            wanted = images_for(loaded, real, given_images(real, "real", None), None, seed, place, said)
            known = Reference(wanted.values, loaded.each, networks, batch, place)
        found = []
        for name, one in named.items():
            images = images_for(loaded, one, taken[name], count, seed, place, said)
            if images.are_pixels == isinstance(loaded.input, AsTheyAre):
                raise UsageError("some proxies are uint8 pixels and others floats: give all of them alike")
            if len(images) < 2:
                raise UsageError(
                    f"proxies {name!r} is 1 image, but a diagnosis compares two halves: give more"
                )
            label = images.source if len(named) == 1 else str(name)
            with said.stage("diagnosis"):
                examined = examine(
                    label, images, loaded.each, networks, real=known, batch=batch, device=place
                )
            found.append(examined.diagnosis)
    return Diagnosed(tuple(found), tuple(ranking([Scores.of(one) for one in found])))
