"""The refine stage: a short distillation of the parents into the merged network, on proxy images only.

Least squares brings every layer of a merged network close to its parents; training the network on the
parents' answers closes most of the distance that is left. No label and no real image is used. A held-out
share of the proxies says when to stop and whether the result is better than the start; if it is not, the
start comes back.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pleas.errors import InputError, NonFinite
from pleas.refine.distil import (
    TINY,
    Closeness,
    Normalise,
    Objective,
    Teacher,
    Teachers,
    heads_of,
    kind_of_outputs,
)
from pleas.refine.features import Features
from pleas.refine.learner import Diverged, Learner, State, laid_out, schedule, with_weights
from pleas.refine.settings import RefineSettings
from pleas.refine.verdict import MIN_HELD_OUT, Look, Verdict, compare, share_held_out
from pleas.refine.views import Augment, Batches, shift_and_flip, split_off
from pleas.settings import Heads, check_places
from pleas.statistics.domains import NO_DOMAINS, look

Progress = Callable[[str, int, int], None]
Renew = Callable[[nn.Module, int], Tensor]
Heard = tuple[list[Tensor], Tensor | None]  # every parent's outputs, and how much each counts

FORMAT = 5
DIVERGED = 3.0  # a held-out loss this many times the start's and that of a network blind to its input
WAYS = (0.75, 0.5, 0.25)  # of the line from the start to the end that are looked at, too
_AT_ONCE = 256  # images judged in one forward pass
_DEFAULTS = RefineSettings()


@dataclass(frozen=True)
class Check:
    """One look at the run. rate: of the next step; trained: mean training loss since the look before."""

    step: int
    seconds: float
    rate: float
    trained: float | None
    evidence: Closeness


@dataclass(frozen=True)
class Snapshot:
    """The network part of the way through the run: what a shorter one on the same schedule would have left."""

    step: int
    seconds: float
    module: nn.Module


@dataclass(frozen=True)
class RefineResult:
    """The refined module, and how close it is to its parents on the held-out images.

    kept:    "refined", or "start" where refining brought the network no closer to its parents, beyond chance
    start:   the module that was given        refined: the best one that training reached; the start where it is kept
    history: every check; the first is the start
    notes:   what is to be said about the run; the last says what decided, and on how many images
    snapshots: the network on its way, evenly over the run, whatever was kept in the end
    way:     how far the module lies on the line from the start (0) to the weights of a check (1)
    """

    module: nn.Module
    kept: Literal["refined", "start"]
    start: Closeness
    refined: Closeness
    history: tuple[Check, ...]
    steps: int
    seconds: float
    held_out: int
    notes: tuple[str, ...]
    snapshots: tuple[Snapshot, ...] = ()
    way: float = 1.0


def refine(
    module: nn.Module,
    teachers: Sequence[Teacher],
    images: Tensor,
    settings: RefineSettings = _DEFAULTS,
    *,
    normalise: Normalise,
    heads: Heads = "shared",
    outputs: Sequence[Sequence[int]] | None = None,
    augment: Augment | None = shift_and_flip,
    renew: Renew | None = None,
    features: Features | None = None,
    groups: list[str] | None = None,
    unused: Tensor | None = None,
    snapshots: int = 0,
    device: torch.device | str = "cpu",
    state: State | None = None,
    checkpoint: Callable[[State], None] | None = None,
    progress: Progress | None = None,
) -> RefineResult:
    """Train all weights of `module` to answer as its parents do.

    images:      proxies, uint8 (N, C, H, W)
    teachers:    the parents, in the order of the merge, each with a name of its own
    normalise:   makes images the merged network's input, and a teacher's that has none of its own
    heads:       "shared": `module` gives (N, K), its target is the mean of the parents' logits;
                 "separate": it gives every parent's outputs side by side
                 "union": it gives the outputs that any parent knows, each the mean over those that do
    outputs:     with "union", for each parent the merged output that each of its outputs is, as in MergeSettings
    augment:     (uint8 images, generator) -> uint8 images; None trains on the images as they are
    renew:       (the network as it is, number of the renewal from 1 on) -> new images, uint8 (N, C, H, W), for
                 settings.renewals; a pure function, so that a resumed run gets the same
    features:    which inner activations are compared, for settings.feature_weight
    groups:      the source of every image by name: the same share of each is held out, and a result is kept only where
                 it is closer to the parents on every source with 32 held-out images
    unused:      bool (N,), images that no layer of `module` was solved on: they are held out before any other
    snapshots:   how often, evenly over the run, the network is kept beside the best one, settings.checks at most:
                 for looking at it afterwards, nothing in the run depends on it
    state:       what `checkpoint` was given last by a run that was interrupted: the run goes on from there,
                 and on a CPU ends with the same bits as one that was not
    progress:    called with (what there is to say, done, total), in steps, or seconds with settings.minutes
    The given modules are not changed. Raises InputError for unusable images, teachers or settings, NonFinite where a
    network returns NaN.
    """
    if settings.renewals and renew is None:
        raise InputError(
            f"renewals = {settings.renewals} asks for new images, but nothing makes them: give `renew`"
        )
    if settings.feature_weight and features is None:
        raise InputError(
            f"feature_weight = {settings.feature_weight:g} needs to know which units are matched: give `features`"
        )
    if outputs is not None:
        check_places(heads, outputs)
    if heads == "union" and (outputs is None or len(outputs) != len(teachers)):
        raise InputError("heads = 'union' needs `outputs`: one tuple of merged outputs for every teacher")
    if not 0 <= snapshots <= settings.checks:
        raise InputError(
            f"snapshots = {snapshots}: one is taken at a check, so 0 to checks = {settings.checks}"
        )
    device = torch.device(device)
    _check_teachers(teachers)
    train, held, sources = _divided(images, settings, groups, unused)
    frozen = [_frozen(teacher, device) for teacher in teachers]
    typical, said = None, ()
    if heads != "union" or settings.targets == "own":  # an output that several know is theirs on every image
        typical, said = _whose(frozen, images, normalise, settings, heads == "shared", device)
    parents = Teachers(frozen, normalise, heads, outputs, typical=typical)
    judge = _Judge(held, sources, parents, normalise, settings, device)
    learner = Learner(module, settings, device)
    start = judge(learner.average)
    if not start.closeness.finite:
        raise NonFinite(
            "the merged network returns NaN or infinity on proxy images before any refining: see the merge"
        )
    batches = Batches(train, settings.batch, settings.seed, augment, settings.views, settings.mix)
    listens = features.to(device) if features is not None and settings.feature_weight else None
    lesson = _Lesson(batches, parents, judge.objective, normalise, settings, device, learner.layout, listens)
    run = _Run(learner, lesson, judge, start, renew, progress, snapshots)
    identity = {**asdict(settings), "images": list(images.shape), "heads": heads, "parents": parents.names}
    if outputs is not None:
        identity["outputs"] = [list(own) for own in outputs]
    identity["groups"] = [
        list(pair) for pair in sorted(Counter(groups or ()).items())
    ]  # as JSON gives it back
    if state is not None:
        _check_state(state, identity)
        run.load(state)
    run.go(lambda found: checkpoint and checkpoint({"format": FORMAT, "run": identity, **found}))
    better = run.verdict.better
    return RefineResult(
        module=with_weights(module, run.best_weights) if better else copy.deepcopy(module),
        kept="refined" if better else "start",
        start=start.closeness,
        refined=run.best,
        history=tuple(run.history),
        steps=learner.step,
        seconds=run.seconds,
        held_out=len(held),
        notes=(*judge.notes, *said, *run.notes, run.verdict.why),
        snapshots=tuple(
            Snapshot(taken["step"], taken["seconds"], with_weights(module, taken["weights"]))
            for taken in run.snapshots
        ),
        way=run.way,
    )


# before the run ---------------------------------------------------------------------------------------------


def _divided(
    images: Tensor, settings: RefineSettings, groups: list[str] | None, unused: Tensor | None
) -> tuple[Tensor, Tensor, list[str] | None]:
    """Images to train on, images held out, and the sources of these."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(
            f"images are {images.dtype} {tuple(images.shape)}: uint8 of shape (N, C, H, W) is needed, "
            "values from 0 to 255"
        )
    count = len(images)
    needed = max(settings.batch + MIN_HELD_OUT, math.ceil(settings.batch / (1 - settings.holdout)))
    if count < needed:
        raise InputError(
            f"refining got {count} proxy images and needs at least {needed}: {MIN_HELD_OUT} or more "
            f"are held out to judge the result, and the others must fill one batch of {settings.batch}. Make "
            "more proxies, or leave the refine stage out"
        )
    if groups is not None and len(groups) != count:
        raise InputError(f"groups names {len(groups)} sources for {count} images: give one for every image")
    if unused is not None and unused.shape != (count,):
        raise InputError(
            f"unused has shape {tuple(unused.shape)} for {count} images: give one value for every image"
        )
    share = share_held_out(count, settings.holdout)
    train, held = split_off(count, share, settings.seed, groups, unused)
    return images[train], images[held], None if groups is None else [groups[i] for i in held.tolist()]


def _check_teachers(teachers: Sequence[Teacher]) -> None:
    names = [teacher.name for teacher in teachers]
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"teachers are {', '.join(names) or 'none'}: give at least one, each with a name of its own"
        )


def _frozen(teacher: Teacher, device: torch.device) -> Teacher:
    module = laid_out(copy.deepcopy(teacher.module).to(device)).eval().requires_grad_(False)
    return replace(teacher, module=module)


def _whose(
    teachers: Sequence[Teacher],
    images: Tensor,
    normalise: Normalise,
    settings: RefineSettings,
    shared: bool,
    device: torch.device,
) -> tuple[Tensor | None, tuple[str, ...]]:
    """How far each parent's own images are from it, where that decides what is learnt; and what is to be said of it."""
    if settings.targets == "mean":
        return None, ()
    seen = (
        [(one.normalise or normalise)(part.to(device)) for one in teachers] for part in images.split(_AT_ONCE)
    )
    domains = look([one.module for one in teachers], seen, [one.name for one in teachers])
    if domains is None:
        if settings.targets == "own":
            raise InputError(NO_DOMAINS)
        return None, ()
    if settings.targets == "auto" and not domains.differ("shared" if shared else "separate"):
        return None, ()
    return domains.typical, tuple(map(str, domains.contradictions)) if shared else ()


def _check_state(state: State, identity: Mapping[str, Any]) -> None:
    if state.get("format") != FORMAT:
        raise InputError(
            f"the saved state has format {state.get('format')!r}, this version reads {FORMAT}: refine afresh"
        )
    then = state["run"]
    changed = [f"{key} was {then[key]} and is {now}" for key, now in identity.items() if then[key] != now]
    if changed:
        raise InputError(
            f"the saved state belongs to another run ({'; '.join(changed)}): go on with the same settings "
            "and images, or refine afresh"
        )


# the run ----------------------------------------------------------------------------------------------------


class _Judge:
    """Looks at networks on the held-out images; the parents answer them once."""

    def __init__(
        self,
        held: Tensor,
        sources: Sequence[str] | None,
        parents: Teachers,
        normalise: Normalise,
        settings: RefineSettings,
        device: torch.device,
    ) -> None:
        self._parts, self._normalise, self._device = held.split(_AT_ONCE), normalise, device
        self.sources = sources
        heard = [parents.heard(part.to(device)) for part in self._parts]
        parts = zip(*(found for found, _ in heard), strict=True)
        shares = [share.cpu() for _, share in heard if share is not None]
        answers = {name: torch.cat(part).cpu() for name, part in zip(parents.names, parts, strict=True)}
        sizes = {name: answer.shape[1] for name, answer in answers.items()}
        if parents.heads == "shared" and len(set(sizes.values())) > 1:
            counts = ", ".join(f"parent {name} {size}" for name, size in sizes.items())
            raise InputError(
                f"outputs per image: {counts}; a shared head needs the same labels, and with different ones each "
                "parent needs its own head (heads: separate)"
            )
        outputs, note = kind_of_outputs(answers)
        self.notes = [note] if note else []
        self._shares = torch.cat(shares) if shares else None
        self._target = parents.together(list(answers.values()), self._shares)
        spread = float(self._target.var(0).mean()) if outputs == "values" else 0.0
        heads = heads_of(sizes, parents.heads, parents.places)
        self.objective = Objective(heads, outputs, settings, spread or 1.0)
        mean = self._target.mean(0).expand_as(self._target)
        self.blind = float(self.objective(mean, self._target, self._shares))

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> Look:
        seen = (laid_out(self._normalise(part.to(self._device))) for part in self._parts)
        output = torch.cat([network(x).float().cpu() for x in seen])
        if output.shape != self._target.shape:
            raise InputError(
                f"the merged network returns {output.shape[1]} outputs per image and its parents' heads have "
                f"{self._target.shape[1]}: `heads` must be what the merge was made with"
            )
        losses = self.objective.each(output, self._target, self._shares).double()
        agreement = self.objective.agreement(output, self._target)
        parts = torch.stack(list(agreement.values()), 1)
        if self._shares is None or len(agreement) == 1:
            agreed, shares = parts.mean(1), parts.mean(0)
        else:
            agreed = (parts * self._shares).sum(1)
            shares = (parts * self._shares).sum(0) / self._shares.sum(0).clamp_min(TINY)
        told = dict(zip(agreement, shares.tolist(), strict=True))
        return Look(Closeness(float(losses.mean()), told), losses, agreed)


@dataclass
class _Lesson:
    """The loss of a step."""

    batches: Batches
    parents: Teachers
    objective: Objective
    normalise: Normalise
    settings: RefineSettings
    device: torch.device
    layout: torch.memory_format
    features: Features | None = None
    renewed: list[Tensor] = field(default_factory=list)
    _known: dict[int, Heard] = field(default_factory=dict)  # answers to batches that come round again
    _first: Batches | None = None

    def renew(self, images: Tensor) -> None:
        """Show these images, too, from the next step on."""
        self._first = self._first or self.batches
        self.renewed.append(images)
        self.batches = self.batches.joined_by(images, len(self.renewed))
        self._known.clear()

    def go_back(self, renewed: Sequence[Tensor]) -> None:
        """Show the images of the start and these renewals."""
        self.batches = self._first or self.batches
        self.renewed.clear()
        self._known.clear()
        for images in renewed:
            self.renew(images)

    def loss(self, network: nn.Module, step: int) -> Tensor:
        number = self.batches.number(step)
        images = self.batches(number).to(self.device, non_blocking=True)
        known = self._known.get(number)
        wanted: list[Tensor] = []
        if self.features is not None:  # too large to be remembered
            answers, wanted = self.features.targets(self.parents.inputs(images))
            known = answers, self.parents.heard(images)[1]
        elif known is None:
            known = self.parents.heard(images)
            if self.settings.views:
                self._known[number] = known
        target, shares = self.parents.together(*known), known[1]
        half = self.settings.half and self.device.type == "cuda"
        with torch.enable_grad():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                seen = laid_out(self.normalise(images), self.layout)
                if self.features is None:
                    return self.objective(network(seen), target, shares)
                output, found = self.features.run(network, seen)
            near = self.features.distance(found, wanted)
            return self.objective(output, target, shares) + self.settings.feature_weight * near


class _Run:
    """From the first step to the last, with a check now and then."""

    def __init__(
        self,
        learner: Learner,
        lesson: _Lesson,
        judge: _Judge,
        start: Look,
        renew: Renew | None,
        progress: Progress | None,
        snapshots: int,
    ) -> None:
        self._learner, self._lesson, self._judge, self._progress = learner, lesson, judge, progress
        self._renew = renew
        self._settings = learner.settings
        self._start, self.best = start, start.closeness
        self._least = math.inf  # held-out loss of the network that the verdict is about
        self.verdict = Verdict(False, "the start is kept: training ended before its first check")
        self._first = self.best_weights = learner.averaged()
        self.way = 0.0
        self.history = [Check(0, 0.0, 0.0, None, start.closeness)]
        self.notes: list[str] = []
        self.snapshots: list[dict[str, Any]] = []
        self._wanted = snapshots
        self._setbacks, self._checks = 0, 0
        self._losses: list[float] = []
        self._before, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of work, earlier sessions of an interrupted run included."""
        return self._before + time.perf_counter() - self._since

    @property
    def done(self) -> float:
        """Share of the run that lies behind, by steps or by the clock."""
        if self._settings.length is not None:
            return self._learner.step / self._settings.length
        return self.seconds / self._settings.limit

    def go(self, keep: Callable[[State], object]) -> None:
        """Train to the end of the schedule; `keep` gets the state after every check."""
        self._train(keep)
        if len(self.history) > 1:
            self._turn_back()

    def _train(self, keep: Callable[[State], object]) -> None:
        safe = self.state()
        while self._learner.step == 0 or (self.done < 1 and not self._patience_is_over()):
            try:
                self._renew_if_due()
                self._step()
                if self.done >= 1 or math.floor(self.done * self._settings.checks) > self._checks:
                    self._check()
                    safe = self.state()
                    keep(safe)
            except Diverged as reason:
                if not self._go_back(safe, reason):
                    return

    def _renew_if_due(self) -> None:
        wanted, lesson = self._settings.renewals, self._lesson
        due = min(wanted, math.floor(self.done * (wanted + 1)))
        while self._renew is not None and len(lesson.renewed) < due:
            number = len(lesson.renewed) + 1
            images = self._renew(self._learner.average, number)
            if images.dtype != torch.uint8 or images.shape[1:] != lesson.batches.shape:
                raise InputError(
                    f"renewal {number} gave {images.dtype} {tuple(images.shape)}: uint8 images of shape "
                    f"{tuple(lesson.batches.shape)} are needed, like those there are"
                )
            lesson.renew(images)

    def _step(self) -> None:
        began = time.perf_counter()
        loss = self._lesson.loss(self._learner.network, self._learner.step)
        self._learner.learn(loss, self._rate())
        self._losses.append(float(loss.detach()))
        took = time.perf_counter() - began
        if self._learner.step == 1 and self._settings.length is None and took > self._settings.limit:
            raise InputError(
                f"minutes = {self._settings.minutes:g} is less than one step takes here ({took:.2g} "
                f"s with batches of {self._settings.batch}): allow more time, or a smaller batch"
            )
        self._tell()

    def _rate(self) -> float:
        settings, here = self._settings, self.done
        if settings.length is not None:
            here += 0.5 / settings.length  # the middle of the step
        return settings.rate * 0.5**self._setbacks * schedule(min(here, 1.0), settings.warmup)

    def _check(self) -> None:
        look = self._judge(self._learner.average)
        evidence = look.closeness
        if not evidence.loss <= DIVERGED * max(self._start.closeness.loss, self._judge.blind):
            raise Diverged(
                f"the held-out loss rose from {self._start.closeness.loss:.3g} to {evidence.loss:.3g}"
            )
        trained = sum(self._losses) / len(self._losses)
        self.history.append(Check(self._learner.step, self.seconds, self._rate(), trained, evidence))
        self._losses.clear()
        self._checks = math.floor(self.done * self._settings.checks)
        self._compare(look, self._learner.averaged())
        if math.floor(min(self.done, 1.0) * self._wanted) > len(self.snapshots):
            check = self.history[-1]
            weights = self._learner.averaged()
            self.snapshots.append({"step": check.step, "seconds": check.seconds, "weights": weights})

    def _compare(self, look: Look, weights: Mapping[str, Tensor], way: float = 1.0) -> None:
        """Keep the closest of the networks that the verdict is for; without one, what there is against the closest."""
        if not look.closeness.finite:
            return
        loss, verdict = look.closeness.loss, compare(self._start, look, self._judge.sources)
        if verdict.better < self.verdict.better or (
            verdict.better == self.verdict.better and loss >= self._least
        ):
            return
        self._least, self.verdict = loss, verdict
        if verdict.better:
            self.best, self.best_weights, self.way = look.closeness, weights, way

    def _turn_back(self) -> None:
        """Look at networks on the line from the start to what training reached.

        Its end is fitted to the proxies and often lies a little too far, for real images more so (WiSE-FT, arXiv
        2109.01903).
        """
        end = self.best_weights if self.verdict.better else self._learner.averaged()
        for way in WAYS:
            weights = {name: value.lerp(end[name], way) for name, value in self._first.items()}
            self._compare(self._judge(with_weights(self._learner.average, weights)), weights, way)

    def _patience_is_over(self) -> bool:
        patience = self._settings.patience
        if patience is None or len(self.history) <= patience:
            return False
        losses = [check.evidence.loss for check in self.history]
        return min(losses[-patience:]) > min(losses[:-patience]) - TINY

    def _go_back(self, safe: State, reason: Diverged) -> bool:
        """Return to the last check, at half the rate; False when that was done often enough."""
        step, setbacks, seconds = self._learner.step, self._setbacks + 1, self.seconds
        if setbacks > self._settings.retries:
            self.notes.append(f"training diverged again after step {step} ({reason}) and ended there")
            return False
        notes = self.notes
        self.load(safe)
        self.notes, self._setbacks, self._before = notes, setbacks, seconds
        self.notes.append(
            f"training diverged after step {step} ({reason}): it went back to step {self._learner.step} and "
            f"on at a rate of {self._settings.rate * 0.5**setbacks:.2g}"
        )
        return True

    def _tell(self) -> None:
        if self._progress is None:
            return
        agreement = 100 * self.history[-1].evidence.mean_agreement
        left = round(self.seconds * max(0.0, 1 / self.done - 1))
        text = (
            f"loss {self._losses[-1]:.3g}, held-out agreement {agreement:.1f} %, "
            f"{left // 60}:{left % 60:02d} left"
        )
        total = self._settings.length or math.ceil(self._settings.limit)
        here = self._learner.step if self._settings.length is not None else math.ceil(self.seconds)
        self._progress(text, min(here, total), total)

    def state(self) -> dict[str, Any]:
        return {
            **self._learner.state(),
            "best": asdict(self.best),
            "best_weights": dict(self.best_weights),
            "verdict": {"better": self.verdict.better, "why": self.verdict.why},
            "least": self._least,
            "way": self.way,
            "history": [asdict(check) for check in self.history],
            "notes": list(self.notes),
            "snapshots": list(self.snapshots),
            "renewed": list(self._lesson.renewed),
            "setbacks": self._setbacks,
            "checks": self._checks,
            "seconds": self.seconds,
        }

    def load(self, state: State) -> None:
        self._learner.load(state)
        self.best = Closeness(**state["best"])
        self.best_weights = dict(state["best_weights"])
        self.verdict, self._least = Verdict(**state["verdict"]), state["least"]
        self.way = state["way"]
        self.history = [
            Check(**{**check, "evidence": Closeness(**check["evidence"])}) for check in state["history"]
        ]
        self.notes = list(state["notes"])
        self.snapshots = list(state["snapshots"])
        self._lesson.go_back(state["renewed"])
        self._setbacks, self._checks = state["setbacks"], state["checks"]
        self._before, self._since = state["seconds"], time.perf_counter()
        self._losses.clear()
