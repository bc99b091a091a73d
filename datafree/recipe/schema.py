"""A recipe: everything that decides the numbers of a merge, checked before anything heavy starts.

Each section's class stands beside the code that uses it; here they are composed, checked against each
other, and every complaint is turned into `file:line:column: path.to.key: what is wrong, and the fix`.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

import pleas
from datafree.evaluation.evaluate import BOTH, Labels, TaskSpec
from datafree.images.image_set import ImageSpec
from datafree.models.parent import BaseSpec, ParentSpec
from datafree.proxy import ProxySpec
from datafree.proxy.kinds.inversion import InversionSpec
from datafree.recipe.comparing import DEFAULT, Compare
from datafree.spec import Spec
from pleas.parents import MOST


class MergeSpec(Spec):
    """How the parents are merged; one merged model per entry of `budgets` or `apart`, all from one pass of
    statistics.

    budgets: multiply-adds of the merged model relative to one parent, from 1 to the number of parents
    apart:   the other way to say it: the fraction of every class's units that stays apart, 0 to 1
    batch:   images per forward pass while statistics are collected
    The other keys are those of `pleas.MergeSettings`.
    """

    budgets: tuple[float, ...] | None = None
    apart: tuple[float, ...] | None = None
    matching: Literal["activation", "weight"] = "activation"
    allocation: Literal["error", "uniform", "zip", "early"] = "error"
    propagate: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    targets: Literal["mean", "own", "auto"] = "auto"
    ridge: float = Field(default=1e-2, gt=0)
    head_ridge: float = Field(default=0.1, gt=0)
    holdout: float = Field(default=0.125, gt=0, le=0.5)
    rows: int = Field(default=16, ge=1)
    positions: int = Field(default=64, ge=1)
    min_rows: float = Field(default=0.25, ge=0, le=1e6)
    batch: int = Field(default=64, ge=1)

    @field_validator("budgets")
    @classmethod
    def _budgets_in_range(cls, budgets: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return _points(
            budgets,
            1.0,
            None,
            "a budget is multiply-adds relative to one parent: 1 is one parent, 2 two of them side by side",
        )

    @field_validator("apart")
    @classmethod
    def _apart_in_range(cls, apart: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return _points(apart, 0.0, 1.0, "it is the fraction of units kept apart: 0 fuses all, 1 fuses none")

    @model_validator(mode="after")
    def _one_of_budgets_and_apart(self) -> MergeSpec:
        if (self.budgets is None) == (self.apart is None):
            found = "neither is given" if self.budgets is None else "both are given"
            raise ValueError(
                f"give exactly one of `budgets` (for example [1.0, 1.25]) and `apart` ([0, 0.25]); {found}"
            )
        return self

    def settings(self, labels: Labels, seed: int) -> pleas.MergeSettings:
        return pleas.MergeSettings(
            matching=self.matching,
            allocation=self.allocation,
            heads=labels,
            propagate=self.propagate,
            targets=self.targets,
            ridge=self.ridge,
            head_ridge=self.head_ridge,
            holdout=self.holdout,
            rows=self.rows,
            positions=self.positions,
            min_rows=self.min_rows,
            seed=seed,
        )


def _points(
    values: tuple[float, ...] | None, low: float, high: float | None, meaning: str
) -> tuple[float, ...] | None:
    if values is None:
        return None
    if not values:
        raise ValueError("the list is empty: give at least one value")
    for value in values:
        if high is None and value < low:
            raise ValueError(f"{value:g} is below {low:g}; {meaning}")
        if high is not None and not low <= value <= high:
            raise ValueError(f"{value:g} is outside [{low:g}, {high:g}]; {meaning}")
    if len(set(values)) < len(values):
        raise ValueError(f"a value appears twice in {list(values)}: keep each once")
    return values


class ProxySection(ProxySpec):
    """The proxies, and whether evaluation images among them are let through (the report then says so)."""

    allow_leak: bool = False


class OracleSpec(Spec):
    """The same merge from `count` real images, reported beside ours as what data would have given."""

    count: int = Field(ge=1)
    images: ImageSpec


class FreshSpec(Spec):
    """New proxies while refining: inverted images on which the network and its parents disagree.

    rounds: how often, evenly over the run    count: images of a round
    weight: of the disagreement beside the inversion's own loss
    """

    rounds: int = Field(default=3, ge=1)
    count: int = Field(default=256, ge=1)
    weight: float = Field(default=1.0, gt=0)


class RefineSpec(Spec):
    """A short distillation of all parents into every merged network, on the proxies alone; its keys are those of
    `pleas.refine.RefineSettings`. Give `steps`, or `minutes` per network.

    augment: shift: moved a little and mirrored; light: kornia's crops, mirrors and colours, as for proxies; none
    proxies: further proxies, which only training sees: public photographs, say, beside images inverted for the merge. A
        section like `proxy`; its seed differs, so inverted images are new ones
    fresh: new proxies while training, for recipes with a source of kind: inversion; they count as proxies of that kind
    curve: how often, evenly over the run, a network is kept for the report's curve of accuracy, 0: no curve. The test
        images are looked at when all networks are final
    """

    steps: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    batch: int = Field(default=64, ge=1)
    rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    targets: Literal["mean", "own", "auto"] = "auto"
    temperature: float = Field(default=1.0, gt=0)
    logit_weight: float = Field(default=1.0, ge=0)
    joint_weight: float = Field(default=0.0, ge=0)
    feature_weight: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    average: float = Field(default=0.99, ge=0, lt=1)
    batch_statistics: bool = True
    views: int = Field(default=512, ge=0)
    mix: float = Field(default=0.0, ge=0, le=1)
    holdout: float = Field(default=0.1, gt=0, le=0.5)
    patience: int | None = Field(default=None, ge=1)
    augment: Literal["shift", "light", "none"] = "shift"
    proxies: ProxySpec | None = None
    fresh: FreshSpec | None = None
    curve: int = Field(default=5, ge=0, le=20)

    @model_validator(mode="after")
    def _steps_or_minutes(self) -> RefineSpec:
        if self.steps is not None and self.minutes is not None:
            raise ValueError("give `steps` or `minutes`, not both")
        if self.proxies is not None and self.proxies.settle is not None:
            raise ValueError(
                "`settle` is about the second moments of the merge's own proxies: remove proxies.settle"
            )
        return self


class Recipe(Spec):
    """One merge: parents, labels, proxies, settings and how the result is judged.

    parents: two or more of one architecture, by names of your choice
    base: the network all of them were fine-tuned from, if there is one: {model: ..., weights: ...}, without being a
        parent
    labels: "shared" (all parents predict the same classes: one head), "separate" (one head per parent) or "union" (one
            head over the classes of all parents, joined by name)
    folder: where relative paths start; the recipe's own folder when absent
    compare: other methods that make one network of the same parents, for the table: `all`, or a list of names and of
        mappings, as `[permutation, {method: regmean, off_diagonal: 0.8}]`; `datafree methods` lists them
    barrier: at how many points of the line between every two parents, ends included, the loss is measured on the
        tasks, as their units come and matched; not measured when absent
    license, base_models: for the model cards, as the Hugging Face Hub names them: apache-2.0, [me/a, me/b]
    """

    name: str
    seed: int = Field(default=0, ge=0)
    folder: str | None = None
    parents: dict[str, ParentSpec]
    base: BaseSpec | None = None
    labels: Labels = "shared"
    proxy: ProxySection
    merge: MergeSpec
    refine: RefineSpec | None = None
    compare: Compare = DEFAULT
    evaluate: tuple[TaskSpec, ...] = ()
    oracle: OracleSpec | None = None
    barrier: int | None = Field(default=None, ge=3, le=101)
    license: str | None = Field(default=None, min_length=1, max_length=100)
    base_models: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()

    @field_validator("name")
    @classmethod
    def _usable_as_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"{name!r} also names the output folder: use letters, digits, '.', '_' and '-', starting "
                "with a letter or digit"
            )
        return name

    @field_validator("parents")
    @classmethod
    def _several(cls, parents: dict[str, ParentSpec]) -> dict[str, ParentSpec]:
        if not 2 <= len(parents) <= MOST:
            raise ValueError(
                f"{len(parents)} parent{'s' * (len(parents) != 1)}: a merge takes 2 to {MOST} networks of one "
                "architecture, as `parents: {first: {model: ...}, second: {model: ...}}`"
            )
        for name in parents:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(
                    f"{name!r} is no name for a parent: use letters, digits, '.', '_' and '-', starting with a "
                    "letter or digit"
                )
        if BOTH in parents:
            raise ValueError(
                f"{BOTH!r} is no name for a parent: as the expert of a task it means all parents; give another"
            )
        return parents

    @model_validator(mode="after")
    def _fresh_from_somewhere(self) -> Recipe:
        fresh = self.refine is not None and self.refine.fresh is not None
        if fresh and not any(isinstance(source, InversionSpec) for source in self.proxy.sources):
            raise ValueError(
                "refine.fresh looks for new images by inversion, and proxy.sources has no kind: inversion: add such a "
                "source, or remove refine.fresh"
            )
        return self

    @model_validator(mode="after")
    def _barrier_on_something(self) -> Recipe:
        if self.barrier is not None and not self.evaluate:
            raise ValueError("barrier is a loss on labelled images: add tasks under `evaluate`, or remove it")
        if self.barrier is not None and self.labels == "separate":
            raise ValueError(
                "barrier is measured between parents that predict the same classes: remove it, or say labels: shared"
            )
        return self

    def fingerprint(self) -> str:
        """SHA-256 of every key that can change a number, and of the parents' order: all of them but `folder`, which
        only says where files lie, and what only a model card reads.
        """
        content = self.model_dump(mode="json", exclude={"folder", "license", "base_models"})
        content["parents"] = list(content["parents"].items())
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
