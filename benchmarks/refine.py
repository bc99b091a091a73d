"""Refining: what it adds to least squares, what other starts reach at the same cost, and the documented search.

    python -m benchmarks.refine table --pairs cifar_halves,cifar_resnet20 --seeds 0,1,2
    python -m benchmarks.refine starts --pair cifar_halves
    python -m benchmarks.refine search --pair cifar_halves

Every finished run is written down at once and found again, so a long table can be stopped and gone on with. Test
images are looked at when a run has ended; nothing that decides a run depends on them.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import click
import torch
from torch import Tensor, nn

import pleas
from benchmarks.common import PROJECT, Pair, load_pair, markdown, percent, write
from datafree.errors import UsageError
from datafree.evaluate import Evaluation
from datafree.images import load_images
from datafree.proxy import ProxySpec, build_proxies
from datafree.recipe import FreshSpec
from datafree.references import build_model
from datafree.seeds import derive_seed
from datafree.stages.refining import AUGMENT, fresh_images
from datafree.store import cache_folder
from pleas.refine import Features, RefineSettings, refine
from pleas.refine.distil import Objective, heads_of
from pleas.refine.settings import STEPS
from pleas.refine.views import split_off
from pleas.symmetry import identity

Row = dict[str, Any]

SEARCH: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rate 3e-4": {"rate": 3e-4},
    "rate 2e-3": {"rate": 2e-3},
    "rate 3e-3": {"rate": 3e-3},
    "batch norms keep their statistics": {"batch_statistics": False},
    "half of the images blended": {"mix": 0.5},
    "all images blended": {"mix": 1.0},
    "no squared error": {"logit_weight": 0.0},
    "squared error, weight 0.1": {"logit_weight": 0.1},
    "temperature 2": {"temperature": 2.0},
    "joint cross-entropy": {"joint_weight": 0.5},
    "new batches at every step": {"views": 0},
    "new images three times": {"renewals": 3},
    "inner activations matched": {"feature_weight": 0.1},
    "batches of 128, half the steps": {"batch": 128, "views": 256},
    "batches of 32, twice the steps": {"batch": 32, "views": 1024},
}


@dataclass(frozen=True)
class Case:
    """A pair, a seed and a number of proxies from the recipe's sources, and what all runs from them share."""

    pair: Pair
    seed: int
    count: int
    augment: str = "shift"

    @cached_property
    def images(self) -> Tensor:
        """The proxies, uint8 (count, C, H, W)."""
        spec = self.pair.recipe.recipe.proxy
        wanted = ProxySpec(count=self.count, sources=spec.sources)
        made = build_proxies(
            wanted,
            [self.pair.a, self.pair.b],
            self.seed,
            cache_folder(),
            self.pair.recipe.base,
            device=str(self.pair.device),
        )
        return torch.cat(list(made.batches(256)))

    @property
    def inputs(self) -> list[Tensor]:
        return [self.pair.a.preprocess(part.to(self.pair.device)) for part in self.images.split(64)]

    @cached_property
    def settings(self) -> pleas.MergeSettings:
        return self.pair.settings(self.seed)

    @cached_property
    def symmetry(self) -> pleas.Symmetry:
        return pleas.trace(self.pair.a.module, self.pair.example())

    @cached_property
    def statistics(self) -> pleas.Statistics:
        return pleas.collect(
            self.symmetry, self.pair.a.module, self.pair.b.module, self.inputs, self.settings
        )

    @cached_property
    def matching(self) -> pleas.Permutation:
        modules = self.pair.a.module, self.pair.b.module
        return pleas.match(self.symmetry, self.statistics, *modules, self.settings)

    @cached_property
    def costs(self) -> pleas.FusingCosts:
        modules = self.pair.a.module, self.pair.b.module
        return pleas.fusing_costs(self.symmetry, self.statistics, self.matching, *modules)

    def plan(self, budget: float) -> pleas.Plan:
        return pleas.make_plan(
            self.symmetry,
            self.statistics,
            self.matching,
            self.pair.a.module,
            self.pair.b.module,
            self.settings,
            budget=budget,
            costs=self.costs,
        )

    def merge(
        self,
        budget: float,
        a: nn.Module | None = None,
        b: nn.Module | None = None,
        matching: pleas.Permutation | None = None,
        least_squares: bool = True,
    ) -> nn.Module:
        """The merged network at a budget; with other networks, matching or no least squares, another start."""
        a, b = a or self.pair.a.module, b or self.pair.b.module
        return pleas.assemble(
            self.symmetry,
            self.statistics,
            matching or self.matching,
            self.plan(budget),
            a,
            b,
            self.settings,
            example=self.pair.example(),
            least_squares=least_squares,
        ).module

    def divergence(self, network: nn.Module) -> float:
        """Mean over heads of KL(parent || network) on the proxies that no run trains on."""
        settings = RefineSettings()
        _, held = split_off(len(self.images), settings.holdout, derive_seed(self.seed, "refine"))
        seen = self.pair.a.preprocess(self.images[held].to(self.pair.device))
        modules = self.pair.a.module, self.pair.b.module
        with torch.no_grad():
            target = pleas.Ensemble(*modules, self.pair.recipe.recipe.labels)(seen)
            output = network.to(self.pair.device)(seen)
        heads = heads_of((self.pair.a.outputs, self.pair.b.outputs), not self.pair.separate)
        plain = Objective(heads, "logits", replace(settings, logit_weight=0.0))
        return float(plain(output, target))

    def refine(self, start: nn.Module, settings: RefineSettings, images: Tensor | None = None) -> Row:
        """Refine `start` and say how it went; the network is under "module"."""
        a, b = self.pair.a, self.pair.b
        features, renew = None, None
        if settings.renewals:
            fresh = FreshSpec(rounds=settings.renewals)
            renew = fresh_images(self.pair.recipe, a, b, a.preprocess, fresh, self.seed, self.pair.device)
        if settings.feature_weight:  # of starts at 1.0x
            features = Features(self.symmetry, self.matching, self.plan(1.0), a.module, b.module)
        result = refine(
            start,
            self.pair.a.module,
            self.pair.b.module,
            self.images if images is None else images,
            replace(settings, seed=derive_seed(self.seed, "refine")),
            normalise=self.pair.a.preprocess,
            heads=self.pair.recipe.recipe.labels,
            augment=AUGMENT[self.augment],
            renew=renew,
            features=features,
            device=self.pair.device,
        )
        return {
            "module": result.module,
            "divergence": self.divergence(result.module),
            "kept": result.kept,
            "start": asdict(result.start),
            "refined": asdict(result.refined),
            "steps": result.steps,
            "minutes": result.seconds / 60,
            "notes": list(result.notes),
            "curve": [[check.seconds, check.evidence.loss] for check in result.history],
        }


def starts(case: Case, budget: float) -> dict[str, Callable[[], nn.Module]]:
    """Networks of the merged network's shape: ours, and what a distillation could start from instead.

    Above 1.0x, a start from one network has the units that are kept apart twice over.
    """
    a, b = case.pair.a.module, case.pair.b.module
    places = identity(case.symmetry)

    def average(one: nn.Module, other: nn.Module, matching: pleas.Permutation, repair: bool) -> nn.Module:
        merged = case.merge(budget, one, other, matching, least_squares=False)
        return pleas.reestimate_bn(merged, case.inputs) if repair else merged

    def fresh(parent: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(case.seed, "random start"))
            built = build_model(parent.reference, dict(parent.arguments), case.pair.recipe.base)
        return built.eval().requires_grad_(False)

    return {
        "merged": lambda: case.merge(budget),
        "permutation only": lambda: average(a, b, case.matching, True),
        "plain average": lambda: average(a, b, places, True),
        "parent A": lambda: average(a, _body(case, b, of=a), places, False),
        "parent B": lambda: average(_body(case, a, of=b), b, places, False),
        "random": lambda: average(
            fresh(case.pair.a), _body(case, fresh(case.pair.b), fresh(case.pair.a)), places, False
        ),
    }


def _body(case: Case, network: nn.Module, of: nn.Module) -> nn.Module:
    """`network` with every weight of `of`, but with its own head where the heads are separate."""
    mixed = copy.deepcopy(network)
    state = dict(of.state_dict())
    if case.pair.separate:
        outputs = set(case.symmetry.output)
        for name, tensor in network.state_dict().items():
            traced = name in case.symmetry.program.parameters and tensor.dim() > 0
            if traced and outputs & set(case.symmetry.axis(name, 0).cls.tolist()):
                state[name] = tensor
    mixed.load_state_dict(state)
    return mixed


# results ----------------------------------------------------------------------------------------------------


class Notebook:
    """Rows of finished runs, one per line of runs/NAME.rows.jsonl, found again by what was run."""

    def __init__(self, name: str) -> None:
        self._path = PROJECT / "runs" / f"{name}.rows.jsonl"

    @property
    def rows(self) -> list[Row]:
        """Read anew each time, for runs beside this one write there, too."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return [json.loads(line) for line in lines]

    def row(self, run: Row, make: Callable[[], Row]) -> Row:
        for row in self.rows:
            if row["run"] == run:
                return row
        row = {"run": run, **make()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:  # a line at once, so that runs beside this one keep theirs
            file.write(json.dumps(row) + "\n")
        print(_line(row), flush=True)
        return row


def _line(row: Row) -> str:
    what = ", ".join(f"{key} {value}" for key, value in row["run"].items() if key != "settings")
    told = f": {100 * row['before']['average']:.1f} -> {100 * row['after']['average']:.1f} %"
    held = f", held-out loss {row['start']['loss']:.3f} -> {row['refined']['loss']:.3f}"
    joint = "" if row["after"]["joint"] is None else f", joint {100 * row['after']['joint']:.1f} %"
    return f"{what}{told}{joint}{held}, {row['minutes']:.1f} min, kept: {row['kept']}"


def measured(case: Case, start: nn.Module, settings: RefineSettings, images: Tensor | None = None) -> Row:
    """Refine, then look at the test images, for the first time."""
    told = case.refine(start, settings, images)
    after = case.pair.score(told.pop("module"))
    return {**told, "before": _numbers(case.pair.score(start)), "after": _numbers(after)}


def _numbers(scored: Evaluation) -> Row:
    return {
        "average": scored.average,
        "joint": scored.joint,
        "tasks": {task.task: task.accuracy for task in scored.tasks},
    }


BUDGET = click.FloatRange(1.0, 2.0)


class Several(click.ParamType):
    """Values of one kind, separated by commas."""

    name = "list"

    def __init__(self, kind: click.ParamType) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        return [self._kind.convert(part, param, ctx) for part in value.split(",")]


def among(only: str | None, known: Sequence[str]) -> Sequence[str]:
    """The runs asked for by --only, all that are known if it was not given."""
    if only is None:
        return known
    wanted = only.split(";")
    strange = [label for label in wanted if label not in known]
    if strange:
        raise click.BadParameter(f"{', '.join(strange)}: known are {'; '.join(known)}", param_hint="--only")
    return wanted


# commands ---------------------------------------------------------------------------------------------------


@click.group()
@click.option("--threads", default=2, show_default=True)
def main(threads: int) -> None:
    """Measure the refine stage."""
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Asked:
    """The options that every command has."""

    device: str
    count: int
    steps: int | None
    name: str | None
    augment: str
    changes: tuple[str, ...]
    refine: tuple[str, ...]

    @property
    def settings(self) -> RefineSettings:
        chosen = dict(_setting(text) for text in self.refine)
        try:
            return replace(RefineSettings(steps=STEPS if self.steps is None else self.steps), **chosen)
        except pleas.InputError as error:
            raise click.UsageError(str(error)) from error

    def pair(self, name: str) -> Pair:
        try:
            return load_pair(name, self.device, self.changes)
        except UsageError as error:
            raise click.UsageError(str(error)) from error

    def case(self, pair: Pair, seed: int) -> Case:
        return Case(pair, seed, self.count, self.augment)

    def run(self, pair: str, seed: int, settings: RefineSettings, **what: Any) -> Row:
        """What a run is found again by."""
        changed: Row = {"set": list(self.changes)} if self.changes else {}
        if self.augment != "shift":
            changed["augment"] = self.augment
        return {
            "pair": pair,
            "seed": seed,
            "count": self.count,
            **what,
            **changed,
            "settings": asdict(settings),
        }


def _setting(text: str) -> tuple[str, Any]:
    """A field of RefineSettings and its value, of KEY=VALUE."""
    key, _, value = text.partition("=")
    known = sorted({field.name for field in fields(RefineSettings)} - {"steps", "minutes", "seed"})
    if key not in known:
        raise click.BadParameter(f"{key}: known are {', '.join(known)}", param_hint="--refine")
    try:
        number = json.loads(value)
    except json.JSONDecodeError:
        number = value
    if isinstance(number, str | list | dict):
        raise click.BadParameter(
            f"{text}: {value!r} is no number, true, false or null", param_hint="--refine"
        )
    return key, number


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of Asked, as `asked`."""

    @functools.wraps(command)
    def call(**given: Any) -> None:
        command(asked=Asked(**{field.name: given.pop(field.name) for field in fields(Asked)}), **given)

    for option in (
        click.option("--device", default="cpu", show_default=True),
        click.option("--count", default=2048, show_default=True, help="Proxies."),
        click.option("--steps", default=None, type=int, help="The default of RefineSettings if not given."),
        click.option("--name", default=None, help="Of the result files."),
        click.option("--augment", default="shift", show_default=True, type=click.Choice(list(AUGMENT))),
        click.option(
            "--set", "changes", multiple=True, help="KEY=VALUE of the recipe, as for datafree merge."
        ),
        click.option("--refine", multiple=True, help="KEY=VALUE of RefineSettings, such as views=0."),
    ):
        call = option(call)
    return call


def one_case(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one pair and seed, and a choice of its runs."""
    for option in (
        click.option("--only", default=None, help="Runs, separated by semicolons; all if not given."),
        click.option("--seed", default=0, show_default=True),
        click.option("--pair", "pair_name", default="cifar_halves", show_default=True),
    ):
        command = option(command)
    return command


@main.command()
@click.option("--pairs", default="cifar_halves,cifar_resnet20,quickstart,disjoint_labels", show_default=True)
@click.option("--budgets", default="1.0,1.25,1.5", show_default=True, type=Several(BUDGET))
@click.option("--seeds", default="0,1,2", show_default=True, type=Several(click.IntRange(min=0)))
@asking
def table(pairs: str, budgets: Sequence[float], seeds: Sequence[int], asked: Asked) -> None:
    """Least squares and refined, for every pair, budget and seed."""
    name, settings = asked.name or "refine", asked.settings
    book = Notebook(name)
    chosen: list[Row] = []
    ceilings: dict[str, Row] = {}
    for pair_name in pairs.split(","):
        pair = asked.pair(pair_name)
        ceilings[pair_name] = _ceiling(pair)
        for seed in seeds:
            case = asked.case(pair, seed)
            for budget in budgets:
                run = asked.run(pair_name, seed, settings, budget=budget)
                chosen.append(
                    book.row(
                        run, lambda case=case, budget=budget: measured(case, case.merge(budget), settings)
                    )
                )
    write(name, chosen, _table(chosen, ceilings), "benchmarks.refine")


def _ceiling(pair: Pair) -> Row:
    """Mean accuracy of the parents on their own tasks, and the ensemble."""
    parents = [pair.score_parent(parent).average for parent in (pair.a, pair.b)]
    ensemble = pair.score(pleas.Ensemble(pair.a.module, pair.b.module, pair.recipe.recipe.labels))
    experts = {parent.name: pair.score_parent(parent) for parent in (pair.a, pair.b)}
    own = [
        score.accuracy
        for parent, scored in experts.items()
        for score in scored.tasks
        if score.expert in (parent, "both")
    ]
    return {"parents": sum(own) / len(own), "all": parents, "ensemble": _numbers(ensemble)}


def _table(rows: Sequence[Row], ceilings: Mapping[str, Row]) -> str:
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["run"]["pair"], row["run"]["budget"]), []).append(row)
    lines = []
    for (pair, budget), group in groups.items():
        top = ceilings[pair]
        line = [pair, f"{budget:g}x"]
        for when in ("before", "after"):
            line.append(percent([row[when]["average"] for row in group]))
        line.append(f"{100 * top['parents']:.1f}")
        line.append(f"{100 * top['ensemble']['average']:.1f}")
        for when in ("before", "after"):
            joint = [row[when]["joint"] for row in group if row[when]["joint"] is not None]
            line.append(percent(joint) if joint else "")
        joint = top["ensemble"]["joint"]
        line.append("" if joint is None else f"{100 * joint:.1f}")
        line.append(f"{sum(row['minutes'] for row in group) / len(group):.1f}")
        line.append(f"{sum(row['kept'] == 'refined' for row in group)} of {len(group)}")
        lines.append(line)
    header = ["pair", "budget", "least squares", "refined", "parents", "ensemble"]
    header += ["joint, least squares", "joint, refined", "joint, ensemble", "minutes", "kept"]
    return markdown(header, lines)


@main.command(name="starts")
@click.option("--budget", default=1.0, show_default=True, type=BUDGET)
@one_case
@asking
def compare_starts(budget: float, pair_name: str, seed: int, only: str | None, asked: Asked) -> None:
    """The same distillation from other starts, and ours on real images (the oracle)."""
    name, settings = asked.name or f"refine_starts_{pair_name}", asked.settings
    book, case = Notebook(name), asked.case(asked.pair(pair_name), seed)
    oracle = case.pair.recipe.recipe.oracle
    made = starts(case, budget)
    labels = among(only, [*made, *(["oracle"] if oracle else [])])
    rows = [
        book.row(
            asked.run(pair_name, seed, settings, budget=budget, start=label),
            lambda make=made[label]: measured(case, make(), settings),
        )
        for label in labels
        if label != "oracle"
    ]
    if oracle is not None and "oracle" in labels:
        real = load_images(oracle.images, case.pair.recipe.base)
        images = real.batch(range(min(asked.count, len(real))))
        label = f"merged, refined on {len(images)} real images"
        run = asked.run(pair_name, seed, settings, budget=budget, start=label)
        rows.append(book.row(run, lambda: measured(case, case.merge(budget), settings, images)))
    lines = [
        [
            row["run"]["start"],
            f"{100 * row['before']['average']:.1f}",
            f"{100 * row['after']['average']:.1f}",
            *([f"{100 * row['after']['joint']:.1f}"] if row["after"]["joint"] is not None else []),
            f"{row['refined']['loss']:.3f}",
            f"{row['minutes']:.1f}",
        ]
        for row in rows
    ]
    joint = ["joint"] if case.pair.separate else []
    header = ["start", "before", "after", *joint, "held-out loss", "minutes"]
    write(name, rows, markdown(header, lines), "benchmarks.refine")


@main.command()
@one_case
@asking
def search(pair_name: str, seed: int, only: str | None, asked: Asked) -> None:
    """One change at a time from the defaults, ordered by what is seen on held-out proxies.

    That is the mean divergence from the parents' probabilities, which every change is judged by alike,
    whatever it minimises.
    """
    name, base = asked.name or "refine_search", asked.settings
    book, case = Notebook(name), asked.case(asked.pair(pair_name), seed)
    labels = among(only, list(SEARCH))
    start = case.merge(1.0)
    rows = []
    for label in labels:
        settings = replace(base, **SEARCH[label])
        if settings.batch != base.batch:
            settings = replace(settings, steps=base.steps * base.batch // settings.batch)  # type: ignore[operator]
        run = asked.run(pair_name, seed, settings, change=label)
        rows.append(book.row(run, lambda settings=settings: measured(case, start, settings)))
    lines = [
        [
            row["run"]["change"],
            f"{row['divergence']:.3f}",
            f"{100 * sum(row['refined']['agreement'].values()) / len(row['refined']['agreement']):.1f}",
            f"{row['minutes']:.1f}",
            f"{100 * row['after']['average']:.1f}",
        ]
        for row in sorted(rows, key=lambda row: row["divergence"])
    ]
    header = [
        "one change",
        "held-out divergence",
        "agreement (%)",
        "minutes",
        "test (%), looked at afterwards",
    ]
    write(name, rows, markdown(header, lines), "benchmarks.refine")


if __name__ == "__main__":
    main()
