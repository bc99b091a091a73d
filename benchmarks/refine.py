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
from benchmarks.common import Notebook, Pair, Row, build, load_pair, markdown, percent, write
from datafree.evaluation.evaluate import Evaluation
from datafree.images.image_set import load_images
from datafree.models.parent import Parent
from datafree.proxy import ProxySet, ProxySpec
from datafree.recipe.schema import FreshSpec
from datafree.references.registry import build_model
from datafree.seeds import derive_seed
from datafree.stages import AllParents
from datafree.stages.refining import AUGMENT, fresh_images
from pleas.refine import Features, RefineSettings, Teacher, refine
from pleas.refine.distil import Objective, heads_of
from pleas.refine.settings import STEPS
from pleas.refine.views import split_off
from pleas.symmetry import identity

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
    """Parents, a seed and a number of proxies from the recipe's sources, and what all runs from them share."""

    pair: Pair
    seed: int
    count: int
    augment: str = "shift"

    @cached_property
    def proxies(self) -> ProxySet:
        spec = ProxySpec(count=self.count, sources=self.pair.work.recipe.recipe.proxy.sources)
        return build(self.pair, spec, self.seed)

    @cached_property
    def images(self) -> Tensor:
        """The proxies, uint8 (count, C, H, W)."""
        return torch.cat(list(self.proxies.batches(256)))

    @cached_property
    def evidence(self) -> pleas.Evidence:
        return self.pair.gather(self.pair.settings(self.seed), self.proxies)

    @property
    def teachers(self) -> list[Teacher]:
        return [Teacher(parent.name, parent.module, parent.preprocess) for parent in self.pair.parents.each]

    def plan(self, budget: float) -> pleas.Plan:
        return pleas.make_plan(self.evidence, budget=budget)

    def merge(self, budget: float) -> nn.Module:
        """The merged network at a budget."""
        return pleas.assemble(self.evidence, self.plan(budget)).module

    def average(self, budget: float, modules: Sequence[nn.Module] | None, matched: bool) -> nn.Module:
        """The merged network's shape without least squares: the mean of `modules`, or of the parents."""
        networks, orders = self.evidence.parents, self.evidence.alignments
        if modules is not None:
            networks = self.pair.networks(networks.settings, modules)
        if not matched:
            orders = (identity(networks.symmetry),) * networks.count
        evidence = replace(self.evidence, parents=networks, alignments=orders)
        return pleas.assemble(evidence, self.plan(budget), least_squares=False).module

    def repaired(self, network: nn.Module) -> nn.Module:
        """A copy with its batch norms re-estimated on the proxies."""
        device = self.pair.work.device
        moved = copy.deepcopy(network).to(device)
        return pleas.reestimate_bn(moved, self.pair.inputs(self.proxies).merged()).cpu()

    def divergence(self, network: nn.Module) -> float:
        """Mean over heads of KL(parents || network) on the proxies that no run trains on."""
        settings, device = RefineSettings(), self.pair.work.device
        _, held = split_off(len(self.images), settings.holdout, derive_seed(self.seed, "refine"))
        seen = self.pair.parents.input(self.images[held].to(device))
        together = AllParents(self.pair.parents, self.pair.labels)
        with torch.no_grad():
            target = copy.deepcopy(together).to(device)(seen)
            output = network.to(device)(seen)
        heads = heads_of(self.pair.outputs, "separate" if self.pair.separate else "shared")
        plain = Objective(heads, "logits", replace(settings, logit_weight=0.0))
        return float(plain(output, target))

    def refine(self, start: nn.Module, settings: RefineSettings, images: Tensor | None = None) -> Row:
        """Refine `start` and say how it went; the network is under "module"."""
        pair, features, renew = self.pair, None, None
        if settings.renewals:
            fresh = FreshSpec(rounds=settings.renewals)
            renew = fresh_images(pair.work.recipe, pair.parents, fresh, self.seed, pair.work.device)
        if settings.feature_weight:  # of starts at 1.0x
            features = Features(self.evidence, self.plan(1.0))
        result = refine(
            start,
            self.teachers,
            self.images if images is None else images,
            replace(settings, seed=derive_seed(self.seed, "refine")),
            normalise=pair.parents.input,
            heads="separate" if pair.separate else "shared",
            augment=AUGMENT[self.augment],
            renew=renew,
            features=features,
            device=pair.work.device,
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

    Above 1.0x, a start from one network has the units that are kept apart several times over.
    """
    parents = case.pair.parents.each

    def alone(network: nn.Module, heads: Sequence[nn.Module]) -> nn.Module:
        """One network in every place, its head replaced by those of `heads` where heads are separate."""
        return case.average(budget, [_body(case, head, of=network) for head in heads], matched=False)

    def fresh(parent: Parent) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(case.seed, "random start", parent.name))
            built = build_model(parent.reference, dict(parent.arguments), case.pair.work.recipe.base)
        return built.eval().requires_grad_(False)

    def random() -> nn.Module:
        made = [fresh(parent) for parent in parents]
        return alone(made[0], made)

    modules = [parent.module for parent in parents]
    return {
        "merged": lambda: case.merge(budget),
        "permutation only": lambda: case.repaired(case.average(budget, None, matched=True)),
        "plain average": lambda: case.repaired(case.average(budget, None, matched=False)),
        **{
            f"parent {parent.name}": lambda parent=parent: alone(parent.module, modules) for parent in parents
        },
        "random": random,
    }


def _body(case: Case, network: nn.Module, of: nn.Module) -> nn.Module:
    """`network` with every weight of `of`, but with its own head where the heads are separate."""
    mixed = copy.deepcopy(network)
    state = dict(of.state_dict())
    symmetry = case.pair.symmetry
    if case.pair.separate:
        outputs = set(symmetry.output)
        for name, tensor in network.state_dict().items():
            traced = name in symmetry.program.parameters and tensor.dim() > 0
            if traced and outputs & set(symmetry.axis(name, 0).cls.tolist()):
                state[name] = tensor
    mixed.load_state_dict(state)
    return mixed


# results ----------------------------------------------------------------------------------------------------


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
        return load_pair(name, self.device, self.changes)

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
                        run,
                        lambda case=case, budget=budget: measured(case, case.merge(budget), settings),
                        _line,
                    )
                )
    write(name, chosen, _table(chosen, ceilings), "benchmarks.refine")


def _ceiling(pair: Pair) -> Row:
    """Mean accuracy of the parents on their own tasks, and the ensemble."""
    experts = {parent.name: pair.score_parent(parent) for parent in pair.parents.each}
    own = [
        score.accuracy
        for parent, scored in experts.items()
        for score in scored.tasks
        if score.expert in (parent, None)
    ]
    return {"parents": sum(own) / len(own), "ensemble": _numbers(pair.score_ensemble())}


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
    oracle = case.pair.work.recipe.recipe.oracle
    made = starts(case, budget)
    labels = among(only, [*made, *(["oracle"] if oracle else [])])
    rows = [
        book.row(
            asked.run(pair_name, seed, settings, budget=budget, start=label),
            lambda make=made[label]: measured(case, make(), settings),
            _line,
        )
        for label in labels
        if label != "oracle"
    ]
    if oracle is not None and "oracle" in labels:
        real = load_images(oracle.images, case.pair.work.recipe.base)
        images = real.batch(range(min(asked.count, len(real))))
        label = f"merged, refined on {len(images)} real images"
        run = asked.run(pair_name, seed, settings, budget=budget, start=label)
        rows.append(book.row(run, lambda: measured(case, case.merge(budget), settings, images), _line))
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
        rows.append(book.row(run, lambda settings=settings: measured(case, start, settings), _line))
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
