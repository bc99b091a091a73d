"""The other methods of a recipe's `compare`: each makes its network from the same evidence, once."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

import pleas
from datafree.cache.store import Stage
from datafree.errors import UsageError
from datafree.recipe.comparing import ALL, SPECS, MethodSpec
from datafree.seeds import derive_seed
from datafree.stages.inputs import Inputs
from datafree.stages.merging import meaning_of_inputs
from datafree.stages.parents import LoadedParents
from datafree.stages.work import Work
from pleas.baselines import has_batch_norm
from pleas.comparators import METHODS, Case, Comparator

MOST_NAMES = 3  # in a note on the table
BASELINES = ("average", "permutation")
REESTIMATED = {
    "proxies": "re-estimated on the proxies",
    "rescale": "re-estimated and the units of other layers rescaled on the proxies",
    "closed": "re-estimated in closed form from the proxies' statistics",
}


@dataclass(frozen=True)
class Chosen:
    """One method of the recipe. entry: its place in the recipe's list; named: there by its name, not by `all`"""

    method: str
    comparator: Comparator
    entry: int
    named: bool = True

    @property
    def name(self) -> str:
        """What tables call it."""
        changed = self.comparator.changed()
        return (self.comparator.title or self.method) + (f" ({changed})" if changed else "")

    @property
    def kind(self) -> Literal["baseline", "comparator"]:
        return "baseline" if self.method in BASELINES else "comparator"


@dataclass(frozen=True)
class Compared:
    """The network of another method, and what it costs."""

    chosen: Chosen
    module: nn.Module
    flops: int
    ratio: float
    parameters: int
    seconds: float
    note: str = ""

    @property
    def name(self) -> str:
        return self.chosen.name

    def told(self) -> dict[str, Any]:
        """For the record of the run."""
        comparator = self.chosen.comparator
        return {
            "method": self.chosen.method,
            "legend": comparator.legend(),
            "settings": asdict(comparator),
            "seconds": round(self.seconds, 3),
        }


def choose_methods(work: Work, networks: pleas.Parents) -> tuple[Chosen, ...]:
    """The methods that the recipe names, each checked to be able to run on these parents; of `all`, those that can.

    Raises UsageError for the others that were named; those that `all` leaves out are noted.
    """
    recipe, found, wrong = work.recipe, dict[Any, Chosen](), []
    left_out: dict[str, list[str]] = {}
    for entry, spec in enumerate(recipe.recipe.compare):
        for one in _candidates(spec, entry):
            why = one.comparator.obstacle(networks, base=networks.base is not None)
            if spec.method != ALL and why is not None:
                wrong.append(str(recipe.error(f"{one.name} cannot run: {why}", "compare", entry)))
            elif why is not None:
                left_out.setdefault(why, []).append(one.name)
            else:
                found.setdefault((one.method, one.comparator), one)
    if wrong:
        raise UsageError("\n".join(wrong))
    for why, names in left_out.items():
        said = f"is left out: {why}" if len(names) == 1 else f"are left out: {why.replace('it ', 'each ', 1)}"
        work.progress.note(f"compare: {', '.join(names)} {said}")
    return tuple(found.values())


def _candidates(spec: MethodSpec, entry: int) -> list[Chosen]:
    specs = SPECS if spec.method == ALL else {spec.method: spec}
    return [
        Chosen(
            method, (one if isinstance(one, MethodSpec) else one()).comparator(), entry, spec.method != ALL
        )
        for method, one in specs.items()
    ]


def compare_methods(
    work: Work, parents: LoadedParents, evidence: pleas.Evidence, chosen: Sequence[Chosen]
) -> tuple[Compared, ...]:
    """The network of every method, on the CPU; one that an earlier run made is found in the store.

    A method that fails is noted where `all` brought it in; one that was named ends the run.
    """
    if not chosen:
        return ()
    with work.progress.stage("comparators"):
        found = []
        for number, one in enumerate(chosen, 1):
            work.progress(one.name, number, len(chosen))
            with work.recipe.at("compare", one.entry):
                try:
                    found.append(_made(work, parents, evidence, one))
                except pleas.PleasError as error:
                    if one.named:
                        raise
                    work.progress.note(f"compare: {one.name} is left out: {error}")
        return tuple(found)


def _made(work: Work, parents: LoadedParents, evidence: pleas.Evidence, one: Chosen) -> Compared:
    inputs = evidence.inputs
    assert isinstance(inputs, Inputs)
    networks = evidence.parents
    seed = derive_seed(work.seed, "compare", one.method)
    meaning = {
        **meaning_of_inputs(work, parents, inputs),
        "settings": asdict(networks.settings),
        "method": one.method,
        "keys": asdict(one.comparator),
        "method seed": seed,
        "base": None if parents.base is None else parents.base.fingerprint,
    }

    def make() -> Stage:
        started = time.perf_counter()
        given = one.comparator(Case(evidence, inputs, networks.base_state, seed))
        module = given if isinstance(given, nn.Module) else _with_state(networks, given)
        told = {"network": pleas.program_config(module), "seconds": time.perf_counter() - started}
        return Stage({name: value.cpu() for name, value in module.state_dict().items()}, told)

    stage = work.finished("compared", meaning, make)
    config = stage.value["network"]
    module = copy.deepcopy(networks.modules[0]).cpu() if config is None else pleas.module_from_config(config)
    module.load_state_dict(stage.tensors)
    flops = pleas.flops(module, networks.example)
    return Compared(
        one,
        module.eval(),
        flops,
        flops / pleas.flops(networks.modules[0], networks.example),
        sum(parameter.numel() for parameter in module.parameters()),
        stage.value["seconds"],
    )


def _with_state(networks: pleas.Parents, state: Any) -> nn.Module:
    module = copy.deepcopy(networks.modules[0]).cpu()
    own = module.state_dict()
    module.load_state_dict(own | {name: value for name, value in state.items() if name in own})
    return module.eval()


def caution(networks: pleas.Parents, compared: Sequence[Compared]) -> dict[str, str]:
    """What a reader must know of the methods, by name: whose batch norms saw the proxies."""
    if not has_batch_norm(networks.symmetry):
        return {}
    said: dict[str, str] = {}
    for how, text in REESTIMATED.items():
        names = [one.name for one in compared if getattr(one.chosen.comparator, "repair", None) == how]
        if names:
            verb = "has its" if len(names) == 1 else "have their"
            said |= dict.fromkeys(names, f"{_listed(names)} {verb} batch norms {text}")
    return said


def _listed(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMES:
        return "Methods that average weights"
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return listed[0].upper() + listed[1:]


def listed_methods() -> list[dict[str, Any]]:
    """Every method as plain data: name, title, legend, needs, most parents, keys with defaults."""
    return [
        {
            "method": name,
            "title": method.title or name,
            "legend": method.legend(),
            "needs": sorted(method.needs),
            "most_parents": method.most_parents,
            "keys": {
                key: field.default for key, field in SPECS[name].model_fields.items() if key != "method"
            },
        }
        for name, method in METHODS.items()
    ]
