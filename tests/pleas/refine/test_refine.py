"""The refine stage: what it promises about its result, its restarts and its messages."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import pleas
from pleas.errors import InputError, NonFinite
from pleas.layers.layer import CONVOLUTION
from pleas.network.module import BlockLayer
from pleas.refine import Closeness, RefineResult, RefineSettings, Teacher, refine, shift_and_flip
from pleas.refine.distil import Objective, Teachers, heads_of
from pleas.refine.learner import training_layout
from pleas.refine.verdict import Look, compare, share_held_out
from pleas.refine.views import Batches, blend, split_off
from pleas.statistics.domains import look as whose
from tests.cases import CASES, conv_bn, pooled_head, randomise

SHORT = RefineSettings(steps=30, batch=16, rate=3e-3, checks=5, holdout=0.4)


def net(seed: int, classes: int = 4) -> nn.Module:
    """Two convolutions with batch norm and a head, random in every number."""
    module = nn.Sequential(conv_bn(3, 6), conv_bn(6, 8), pooled_head(8, classes)).eval()
    return randomise(module, torch.Generator().manual_seed(seed)).requires_grad_(False)


def normalise(images: Tensor) -> Tensor:
    return images.float() / 64 - 2


def proxies(count: int = 160) -> Tensor:
    """Smooth random images in strong colours, on which random networks differ."""
    smooth = torch.randn(count, 3, 3, 3, generator=torch.Generator().manual_seed(5)) * 0.7 + 0.5
    return (F.interpolate(smooth, 12, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def run(
    module: nn.Module | None = None,
    settings: RefineSettings = SHORT,
    a: nn.Module | None = None,
    b: nn.Module | None = None,
    **options: Any,
) -> RefineResult:
    """A run of two parents, from the first of them unless told otherwise."""
    a, b = a or net(1), b or net(2)
    images = options.pop("images", proxies())
    teachers = options.pop("teachers", (Teacher("a", a), Teacher("b", b)))
    return refine(module or a, teachers, images, settings, normalise=normalise, **options)


def two_heads(a: nn.Module, b: nn.Module) -> nn.Module:
    """A's body with the heads of both parents side by side."""
    merged = copy.deepcopy(a)
    heads = [module[2][2] for module in (a, b)]  # type: ignore[index]
    joined = nn.Linear(8, sum(head.out_features for head in heads))
    with torch.no_grad():
        joined.weight.copy_(torch.cat([head.weight for head in heads]))
        joined.bias.copy_(torch.cat([head.bias for head in heads]))
    merged[2][2] = joined  # type: ignore[index]
    return merged.requires_grad_(False)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether every parameter and buffer is the same bit for bit."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# the result -----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["shared", "separate"])
def test_comes_closer_to_both_parents(heads: Any) -> None:
    a, b = net(1), net(2, 4 if heads == "shared" else 3)
    start = net(3) if heads == "shared" else two_heads(net(3), net(4, 3))
    result = run(start, replace(SHORT, steps=120), a, b, heads=heads)
    assert result.kept == "refined"
    assert result.refined.loss < 0.7 * result.start.loss
    assert set(result.refined.agreement) == ({"shared"} if heads == "shared" else {"a", "b"})
    assert result.history[0].evidence == result.start
    assert [check.step for check in result.history] == [0, 24, 48, 72, 96, 120]
    assert result.steps == 120
    assert result.held_out == 64


@pytest.mark.parametrize("heads", ["shared", "separate"])
def test_three_parents_are_three_teachers(heads: Any) -> None:
    """Against the loss by hand: of the mean of all logits, or head by head of each parent's own."""
    networks = [net(seed) for seed in (1, 2, 3)]
    start = net(4, 4 if heads == "shared" else 12)
    teachers = [Teacher(name, network) for name, network in zip(("x", "y", "z"), networks, strict=True)]
    result = run(start, replace(SHORT, steps=120), teachers=teachers, heads=heads)
    assert result.kept == "refined"
    assert list(result.refined.agreement) == (["shared"] if heads == "shared" else ["x", "y", "z"])
    _, held = split_off(160, SHORT.holdout, SHORT.seed)
    seen = normalise(proxies()[held])
    with torch.no_grad():
        answers, output = [network(seen) for network in networks], result.module(seen)
    targets = [torch.stack(answers).mean(0)] if heads == "shared" else answers
    parts = [output] if heads == "shared" else output.split(4, 1)
    pairs = list(zip(parts, targets, strict=True))
    loss = sum(by_hand(part, target, 1.0) for part, target in pairs) / len(pairs)
    squared = sum(float((part - target).square().mean()) for part, target in pairs) / len(pairs)
    assert result.refined.loss == pytest.approx(loss + SHORT.logit_weight * squared, rel=1e-4)
    for found, (part, target) in zip(result.refined.agreement.values(), pairs, strict=True):
        assert found == pytest.approx(float((part.argmax(1) == target.argmax(1)).float().mean()))


def test_a_teacher_may_see_images_in_its_own_way() -> None:
    """A network behind its own normalisation, and the same one with that normalisation built in."""

    class Dimmed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x / 2)

    own = run(net(3), teachers=[Teacher("a", net(1)), Teacher("b", net(2), lambda x: normalise(x) / 2)])
    built_in = run(net(3), teachers=[Teacher("a", net(1)), Teacher("b", Dimmed())])
    assert same(own.module, built_in.module)


@pytest.mark.parametrize(
    ("names", "said"),
    [((), "teachers are none: give at least one"), (("a", "a"), "teachers are a, a: give at least")],
)
def test_teachers_need_names_of_their_own(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(teachers=[Teacher(name, net(1)) for name in names])


def test_evidence_is_that_of_the_returned_module() -> None:
    a, b = net(1), net(2)
    result = run(a, a=a, b=b)
    _, held = split_off(160, SHORT.holdout, SHORT.seed)
    seen = normalise(proxies()[held])
    with torch.no_grad():
        target, output = (a(seen) + b(seen)) / 2, result.module(seen)
    agreement = float((output.argmax(1) == target.argmax(1)).float().mean())
    assert result.refined.agreement["shared"] == pytest.approx(agreement)
    loss = by_hand(output, target, temperature=1.0) + SHORT.logit_weight * float(
        (output - target).square().mean()
    )
    assert result.refined.loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("rate", "way"), [(3e-3, 1.0), (1e-1, 0.75)])
def test_training_that_went_too_far_is_taken_back_part_of_the_way(rate: float, way: float) -> None:
    """The returned network lies on the line from the start to the only check, where the held-out loss is least."""
    start = net(3)
    result = run(start, replace(SHORT, steps=6, checks=1, rate=rate), snapshots=1)
    assert result.kept == "refined"
    assert result.way == way
    assert (result.refined.loss < 0.9 * result.history[-1].evidence.loss) == (way < 1)
    ends = zip(start.named_parameters(), result.snapshots[-1].module.parameters(), strict=True)
    ours = dict(result.module.named_parameters())
    for (name, first), last in ends:
        assert torch.allclose(ours[name], first + way * (last - first), atol=1e-5)


def test_nothing_that_was_given_is_changed() -> None:
    a, b, start = net(1), net(2), net(3).train()
    before = [copy.deepcopy(module) for module in (a, b, start)]
    images = proxies()
    random = torch.get_rng_state()
    run(start, a=a, b=b, images=images)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(images, proxies())
    for module, copied in zip((a, b, start), before, strict=True):
        assert same(module, copied)
        assert all(not p.requires_grad for p in module.parameters())
    assert start.training
    assert not a.training


@pytest.mark.parametrize("moves", [True, False])
def test_batch_norms_follow_the_batches_or_keep_their_statistics(moves: bool) -> None:
    result = run(net(3), replace(SHORT, batch_statistics=moves))
    assert result.kept == "refined"
    before, after = (dict(module.named_buffers()) for module in (net(3), result.module))
    assert all(torch.equal(before[name], after[name]) != moves for name in before if "running" in name)
    assert not any(module.training for module in result.module.modules())


def test_a_start_that_cannot_be_bettered_is_kept() -> None:
    a = net(1)
    result = run(a, a=a, b=a)  # the parents are one network, and the start is that network
    assert result.kept == "start"
    assert result.start.loss == pytest.approx(0, abs=1e-6)
    assert same(result.module, a)


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    first, again, other = run(), run(), run(settings=replace(SHORT, seed=1))
    assert same(first.module, again.module)
    assert not same(first.module, other.module)


def test_patience_ends_a_run_that_no_longer_improves() -> None:
    a = net(1)
    gentle = replace(SHORT, steps=200, checks=20, patience=2, rate=1e-5, batch_statistics=False)
    result = run(a, gentle, a, a)
    assert result.steps == 20


# interruption -----------------------------------------------------------------------------


@pytest.mark.parametrize("views", [0, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(views: int) -> None:
    settings = replace(SHORT, views=views)
    states: list[Any] = []
    whole = run(settings=settings, checkpoint=states.append)
    assert [state["step"] for state in states] == [6, 12, 18, 24, 30]
    for state in states:
        resumed = run(settings=settings, state=copy.deepcopy(state))
        assert same(resumed.module, whole.module)
        assert resumed.refined == whole.refined
        assert [c.evidence for c in resumed.history] == [c.evidence for c in whole.history]
        assert resumed.steps == 30


def test_snapshots_show_the_network_on_its_way_and_change_nothing() -> None:
    states: list[Any] = []
    plain, whole = run(net(3)), run(net(3), snapshots=5, checkpoint=states.append)
    assert same(plain.module, whole.module)
    assert [taken.step for taken in whole.snapshots] == [6, 12, 18, 24, 30]
    best = min(range(1, 6), key=lambda i: whole.history[i].evidence.loss)
    assert same(whole.snapshots[best - 1].module, whole.module)
    assert not same(whole.snapshots[0].module, whole.snapshots[-1].module)
    resumed = run(net(3), snapshots=5, state=copy.deepcopy(states[1]))
    for taken, again in zip(whole.snapshots, resumed.snapshots, strict=True):
        assert taken.step == again.step
        assert same(taken.module, again.module)
    assert [taken.step for taken in run(snapshots=2).snapshots] == [18, 30]


def test_more_snapshots_than_checks_are_refused() -> None:
    with pytest.raises(InputError, match=r"snapshots = 6: one is taken at a check, so 0 to checks = 5"):
        run(snapshots=6)


def bright(network: nn.Module, number: int) -> Tensor:
    """New images that depend on the network and the renewal, and on nothing else."""
    with torch.no_grad():
        shade = float(network(normalise(proxies(8))).std())
    return (proxies(16).float() * (0.5 + 0.1 * number) + 10 * shade).clamp(0, 255).to(torch.uint8)


def test_new_images_are_asked_for_evenly_and_trained_on() -> None:
    settings, asked = replace(SHORT, renewals=2), []

    def renew(network: nn.Module, number: int) -> Tensor:
        assert not network.training
        asked.append(number)
        return bright(network, number)

    renewed, plain = run(settings=settings, renew=renew), run()
    assert asked == [1, 2]
    assert [c.evidence for c in renewed.history[:2]] == [c.evidence for c in plain.history[:2]], "not before"
    assert not same(renewed.module, plain.module)


def test_a_run_with_new_images_resumes_bit_for_bit() -> None:
    settings, states = replace(SHORT, renewals=2), []
    whole = run(settings=settings, renew=bright, checkpoint=states.append)
    assert [len(state["renewed"]) for state in states] == [0, 1, 1, 2, 2]
    for state in states:
        resumed = run(settings=settings, renew=bright, state=copy.deepcopy(state))
        assert same(resumed.module, whole.module)


def test_new_images_of_another_kind_are_refused() -> None:
    settings = replace(SHORT, renewals=1)
    with pytest.raises(InputError, match=r"renewal 1 gave torch\.uint8 \(4, 3, 9, 9\)"):
        run(settings=settings, renew=lambda network, number: torch.zeros(4, 3, 9, 9, dtype=torch.uint8))
    with pytest.raises(InputError, match="nothing makes them: give `renew`"):
        run(settings=settings)


def test_state_is_plain_data_that_torch_loads_without_code(tmp_path: Any) -> None:
    states: list[Any] = []

    def stop(text: str, done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=states.append, progress=stop)
    torch.save(states[-1], tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 12
    assert same(run(state=state).module, run().module)


def test_a_state_of_another_run_is_refused() -> None:
    states: list[Any] = []
    run(checkpoint=states.append)
    with pytest.raises(
        InputError, match=r"belongs to another run \(rate was 0\.003 and is 0\.001; seed was 0 and is 1\)"
    ):
        run(settings=replace(SHORT, rate=1e-3, seed=1), state=states[0])
    with pytest.raises(InputError, match=r"format 0, this version reads 5: refine afresh"):
        run(state={**states[0], "format": 0})


# divergence -----------------------------------------------------------------------------


def test_a_rate_far_too_high_is_halved_and_never_harms() -> None:
    result = run(settings=replace(SHORT, rate=1e4, retries=3, batch_statistics=False))
    assert result.kept == "start"
    assert same(result.module, net(1))
    assert len(result.notes) == 5
    assert "it went back to step 0 and on at a rate of 5e+03" in result.notes[0]
    assert "diverged again after step" in result.notes[-2]
    assert result.notes[-1] == "the start is kept: training ended before its first check"


class Stumbling(nn.Module):
    """Returns NaN on its n-th call with gradients."""

    def __init__(self, inner: nn.Module, at: int) -> None:
        super().__init__()
        self.inner, self.left = inner, at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= torch.is_grad_enabled()
        return self.inner(x) * (math.nan if self.left == 0 else 1.0)


def test_one_nan_costs_a_halving_and_the_steps_since_the_last_check() -> None:
    result = run(Stumbling(net(1), 15))
    assert result.kept == "refined"
    assert result.steps == 30
    assert result.notes[:-1] == (
        "training diverged after step 14 (the loss became nan): it went back to step 12 and on at a rate of "
        "0.0015",
    )
    assert [check.step for check in result.history] == [0, 6, 12, 18, 24, 30]


# the clock -----------------------------------------------------------------------------


class Clock:
    """Moves on by so many seconds whenever somebody looks: a run sees the same times on every machine."""

    def __init__(self, tick: float) -> None:
        self.tick, self.now = tick, 0.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def test_minutes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", Clock(0.002))
    told: list[tuple[str, int, int]] = []
    result = run(settings=replace(SHORT, steps=None, minutes=0.02), progress=lambda *said: told.append(said))
    assert 1.2 <= result.seconds < 1.25  # the last step may end later
    assert result.steps == len(told)
    assert len(result.history) == 6
    assert told[-1][1:] == (2, 2)
    assert "held-out agreement" in told[-1][0]
    assert told[-1][0].endswith("0:00 left")


def test_minutes_below_one_step() -> None:
    with pytest.raises(
        InputError, match=r"minutes = 1e-06 is less than one step takes here \(0\.\d+ s with batches of 16\)"
    ):
        run(settings=replace(SHORT, steps=None, minutes=1e-6))


# bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 10, "minutes": 1.0}, r"steps = 10 and minutes = 1 are both given"),
        ({"steps": 0}, r"steps = 0: at least one step is needed; to refine nothing, leave the stage out"),
        ({"minutes": 0.0}, r"minutes = 0: must be above 0"),
        ({"minutes": math.nan}, r"minutes = nan: must be above 0"),
        ({"batch": 0}, r"batch = 0: must be at least 1"),
        ({"rate": 0.0}, r"rate = 0: must be above 0"),
        ({"temperature": -1.0}, r"temperature = -1: must be above 0"),
        ({"logit_weight": -0.1}, r"logit_weight = -0\.1: must not be negative"),
        ({"warmup": 1.0}, r"warmup = 1: must be at least 0 and below 1"),
        ({"holdout": 0.0}, r"holdout = 0: .* nothing else says when to stop"),
        ({"mix": 1.5}, r"mix = 1\.5: must be between 0 and 1, a share of every batch"),
        ({"patience": 0}, r"patience = 0: must be at least 1 check"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RefineSettings(**change)


def test_no_or_too_few_images() -> None:
    for count in (0, 20):
        with pytest.raises(
            InputError,
            match=rf"refining got {count} proxy images and needs at least 80: 64 or more are held out",
        ):
            run(images=proxies(count) if count else torch.zeros(0, 3, 12, 12, dtype=torch.uint8))


def test_images_that_are_not_pixels() -> None:
    with pytest.raises(
        InputError,
        match=r"images are torch\.float32 \(160, 3, 12, 12\): uint8 of shape \(N, C, H, W\) is needed",
    ):
        run(images=proxies().float())


def test_heads_that_do_not_fit() -> None:
    with pytest.raises(
        InputError,
        match=r"outputs per image: parent a 4, parent b 3; a shared head needs the same labels, and with",
    ):
        run(b=net(2, 3))
    with pytest.raises(
        InputError, match=r"returns 4 outputs per image and its parents' heads have 8: `heads` must"
    ):
        run(heads="separate")


def poisoned(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(module.parameters())[0] = math.nan
    return module


def test_nan_in_a_parent_or_in_the_start() -> None:
    with pytest.raises(NonFinite, match=r"parent b returns NaN or infinity on proxy images"):
        run(b=poisoned(net(2)))
    with pytest.raises(
        NonFinite, match=r"the merged network returns NaN or infinity on proxy images before any refining"
    ):
        run(poisoned(net(3)))


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda module: nn.Sequential(module, nn.Softmax(1)),
            r"parent a returns numbers that sum to 1 \(probabilities\)",
        ),
        (
            lambda module: nn.Sequential(module, Unit()),
            r"parent a returns vectors of one length \(an embedding\)",
        ),
        (None, r"parent a returns one number per image"),
    ],
)
def test_outputs_that_are_no_logits_are_said_and_fitted_as_they_are(
    change: Callable[[nn.Module], nn.Module] | None, said: str
) -> None:
    a, b = (net(seed, 1) if change is None else change(net(seed)) for seed in (1, 2))
    result = run(a, replace(SHORT, steps=100), a, b)
    note, decided = result.notes
    assert decided.startswith("the refined network is kept: on 64 held-out images the loss goes from")
    assert re.search(said, note)
    assert "by squared error, without softmax and temperature" in note
    assert result.kept == "refined"
    assert result.refined.agreement["shared"] > result.start.agreement["shared"]


# the verdict ----------------------------------------------------------------------------


def look(losses: Tensor, agreed: Tensor) -> Look:
    closeness = Closeness(float(losses.mean()), {"shared": float(agreed.mean())})
    return Look(closeness, losses.double(), agreed.double())


def spread(count: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, whose mean is 0 and deviation 1 exactly."""
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()
    return (numbers - numbers.mean()) / numbers.std()


@pytest.mark.parametrize(
    ("count", "gain", "better"), [(26, 0.3, False), (26, 0.45, True), (400, 0.09, False), (400, 0.11, True)]
)
def test_a_gain_counts_from_two_standard_errors_on(count: int, gain: float, better: bool) -> None:
    """The gain of every image is `gain` plus noise of deviation 1, so the limit is 2 / sqrt(count)."""
    losses, agreed = 5 + 3 * spread(count, 1), torch.ones(count)
    verdict = compare(look(losses, agreed), look(losses - gain - spread(count), agreed))
    assert verdict.better == better
    said = f"on {count} held-out images the loss goes from 5 to {5 - gain:.3g} (down by {gain:.2g} "
    assert said + f"± {2 / count**0.5:.2g}" in verdict.why
    assert verdict.why.endswith(", no gain beyond chance") != better


def test_agreement_may_not_drop_beyond_chance() -> None:
    losses, agreed = torch.rand(100), torch.ones(100)
    start = look(losses, agreed)
    some, many = agreed.clone(), agreed.clone()
    some[:3], many[:10] = 0, 0
    assert compare(start, look(losses / 2, some)).better
    verdict = compare(start, look(losses / 2, many))
    assert not verdict.better
    assert (
        "agreement with the parents from 100.0 to 90.0 % (by -10 ± 6 points), so agreement is lost"
        in verdict.why
    )


def test_every_source_with_enough_images_has_to_gain() -> None:
    """A gain on inverted images and a loss on photographs, which are 32 or too few to have a say."""
    for photographs, better in ((32, False), (31, True)):
        start = look(torch.ones(100 + photographs), torch.ones(100 + photographs))
        found = torch.cat([torch.full((100,), 0.5), torch.full((photographs,), 1.1)])
        sources = ["inversion"] * 100 + ["photographs"] * photographs
        verdict = compare(start, look(found, torch.ones(len(found))), sources)
        assert verdict.better == better
        expected = "but on the 32 of photographs the loss goes down by -0.1 ± "
        assert (expected in verdict.why) != better


def test_rounding_is_no_gain() -> None:
    losses = torch.full((100,), 0.5).double()
    assert not compare(look(losses, losses), look(losses - 1e-7, losses)).better


def test_a_source_the_network_unlearns_keeps_the_start() -> None:
    """The start is exact on dark images; training on others, rare among the dark ones, unlearns it."""
    teacher, bright = net(1), proxies(160)
    dark = bright // 8
    names = ["bright"] * 160 + ["dark"] * 160
    settings = replace(SHORT, holdout=0.25)

    class Switch(nn.Module):
        """Another network for bright images."""

        def __init__(self) -> None:
            super().__init__()
            self.dark, self.bright = net(1), net(2)

        def forward(self, x: Tensor) -> Tensor:
            light = (x.amax((1, 2, 3)) > -1)[:, None]
            return torch.where(light, self.bright(x), self.dark(x))

    given = {"images": torch.cat([bright, dark]), "teachers": [Teacher("a", Switch())]}
    assert run(teacher, settings, **given).kept == "refined"
    result = run(teacher, settings, groups=names, **given)
    assert result.kept == "start"
    assert re.search(
        r"but on the 40 of dark the loss goes down by -.* no gain beyond chance", result.notes[-1]
    )
    assert same(result.module, teacher)


def test_unused_images_are_told_for_every_image() -> None:
    with pytest.raises(
        InputError, match=r"unused has shape \(2,\) for 160 images: give one value for every image"
    ):
        run(unused=torch.ones(2, dtype=torch.bool))


def test_sources_are_named_for_every_image() -> None:
    with pytest.raises(InputError, match="groups names 2 sources for 160 images: give one for every image"):
        run(groups=["a", "b"])


@pytest.mark.parametrize(
    ("count", "held"), [(128, 64), (256, 64), (400, 100), (512, 128), (1000, 128), (2000, 200)]
)
def test_more_are_held_out_of_few(count: int, held: int) -> None:
    assert round(count * share_held_out(count, 0.1)) == held


# loss and batches -----------------------------------------------------------------------------


def by_hand(output: Tensor, target: Tensor, temperature: float) -> float:
    """T^2 times the mean Kullback-Leibler divergence, image by image and class by class."""
    total = 0.0
    for ours, theirs in zip(output.double().tolist(), target.double().tolist(), strict=True):
        q, p = ([math.exp(v / temperature) for v in values] for values in (ours, theirs))
        q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return temperature**2 * total / len(output)


def test_loss_is_the_mean_over_heads_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(9, 5, generator=generator), torch.randn(9, 5, generator=generator)
    settings = RefineSettings(temperature=2.0, logit_weight=0.3, joint_weight=0.5)
    heads = [by_hand(output[:, :3], target[:, :3], 2.0), by_hand(output[:, 3:], target[:, 3:], 2.0)]
    error = float((output - target).square().mean())
    expected = sum(heads) / 2 + 0.3 * error + 0.5 * by_hand(output, target, 2.0)
    objective = Objective(heads_of({"a": 3, "b": 2}, "separate"), "logits", settings)
    assert float(objective(output, target)) == pytest.approx(expected, rel=1e-5)
    assert float(objective(target, target)) == pytest.approx(0, abs=1e-6)


def test_every_image_comes_once_before_any_comes_again() -> None:
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None]
    batches = Batches(images, 4, seed=0, augment=None, views=0)
    seen = torch.cat([batches(batches.number(step)) for step in range(5)]).flatten().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_limited_views_come_round_in_new_orders_and_are_the_same_batches() -> None:
    batches = Batches(proxies(), 16, seed=3, augment=shift_and_flip, views=7)
    laps = [[batches.number(step) for step in range(lap * 7, lap * 7 + 7)] for lap in range(3)]
    assert all(sorted(lap) == list(range(7)) for lap in laps)
    assert laps[0] != laps[1]
    fresh = Batches(proxies(), 16, seed=3, augment=shift_and_flip, views=7)
    assert torch.equal(batches(4), fresh(4))
    assert not torch.equal(batches(4), batches(5))


def test_parents_answer_each_view_once() -> None:
    class Counting(nn.Module):
        calls = 0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            return self.inner(x)

    run(net(1), replace(SHORT, views=4), a=Counting(net(1)))
    assert Counting.calls == 1 + 1 + 4  # whose the images are, the held-out ones, and every view


def test_shift_and_flip_by_loops() -> None:
    images = proxies(6)
    moved = shift_and_flip(images, torch.Generator().manual_seed(0), shift=0.25)
    assert moved.dtype == torch.uint8
    for image, result in zip(images, moved, strict=True):
        padded = F.pad(image.float()[None], (3, 3, 3, 3), mode="reflect")[0].to(torch.uint8)
        windows = [padded[:, y : y + 12, x : x + 12] for y in range(7) for x in range(7)]
        assert any(torch.equal(result, window) or torch.equal(result, window.flip(2)) for window in windows)


def test_blend_by_loops() -> None:
    images = proxies(8)
    blended = blend(images, 0.75, torch.Generator().manual_seed(1))
    assert torch.equal(blended[6:], images[6:])
    generator = torch.Generator().manual_seed(1)
    order, part = torch.randperm(8, generator=generator), torch.rand(6, 1, 1, 1, generator=generator)
    for i in range(6):
        exact = part[i] * images[i].double() + (1 - part[i]) * images[order[i]].double()
        assert (blended[i].double() - exact).abs().max() <= 0.5 + 1e-4
    assert torch.equal(blend(images, 0.0, generator), images)


def test_every_source_is_split_alike() -> None:
    names = ["a", "b", "a"] * 20
    train, held = split_off(60, 0.25, seed=1, sources=names)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(60))
    assert Counter(names[i] for i in held) == {"a": 10, "b": 5}


def test_split_is_a_partition() -> None:
    train, held = split_off(50, 0.2, seed=1)
    assert len(held) == 10
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(50))
    assert not torch.equal(held, split_off(50, 0.2, seed=2)[1])


def test_images_that_nothing_learnt_from_are_held_out_first() -> None:
    unused = torch.zeros(40, dtype=torch.bool)
    unused[[3, 17, 30]] = True
    names = ["photo", "noise"] * 20
    train, held = split_off(40, 0.25, seed=1, sources=names, unused=unused)
    assert {3, 17, 30} <= set(held.tolist())
    assert [sum(names[i] == name for i in held.tolist()) for name in ("photo", "noise")] == [5, 5]
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(40))


# what the hardware's library gets wrong ---------------------------------------------------


@pytest.mark.parametrize(
    ("convolution", "safe"),
    [
        (nn.Conv2d(6, 8, 1, stride=2), False),
        (nn.Conv2d(16, 8, 1, stride=2), True),
        (nn.Conv2d(6, 8, 1), True),
        (nn.Conv2d(6, 8, 3, stride=2), True),
        (nn.Conv2d(32, 8, 1, stride=2, groups=4), False),
    ],
)
def test_channels_last_is_left_where_it_corrupts_memory(convolution: nn.Module, safe: bool) -> None:
    expected = torch.channels_last if safe else torch.contiguous_format
    assert training_layout(nn.Sequential(convolution), torch.device("cpu")) == expected
    assert training_layout(nn.Sequential(convolution), torch.device("cuda")) == torch.channels_last


class Blurs(nn.Module):
    """A convolution whose kernel is a buffer, as in anti-aliased networks."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel: Tensor
        self.register_buffer("kernel", torch.ones(6, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.convolution(x, self.kernel, None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1)


def test_kernels_that_are_not_trained_do_no_harm() -> None:
    graph = torch.export.export(Blurs(), (torch.zeros(2, 6, 8, 8),)).module()
    assert isinstance(graph, fx.GraphModule)
    for node in graph.graph.nodes:  # as a merged network has it
        if node.target is torch.ops.aten.conv2d.default:
            node.target = CONVOLUTION
            node.args = (*node.args[:2], None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1)
    assert any(node.target is CONVOLUTION for node in graph.graph.nodes)
    assert training_layout(graph, torch.device("cpu")) == torch.channels_last


def test_graphs_are_looked_into_for_that_and_blocks_see_to_it_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["residual"]
    images = torch.randn((96, *case.shape[1:]), generator=torch.Generator().manual_seed(5)).split(32)
    for apart, expected in ((0.0, torch.contiguous_format), (0.5, torch.channels_last)):
        merged = pleas.merge(case.model(0), case.model(1), images, apart=apart).module
        assert training_layout(merged, torch.device("cpu")) == expected
    layers = [module for module in merged.modules() if isinstance(module, BlockLayer) and module.subsamples]
    assert layers
    inputs = [torch.randn(2, layer.units, 9, 9) for layer in layers]
    ours = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    monkeypatch.setattr(BlockLayer, "subsamples", False)
    for layer, x, detour in zip(layers, inputs, ours, strict=True):
        assert torch.allclose(detour, layer(x), atol=1e-5)


# whose image it is ----------------------------------------------------------------------


def tinted() -> Tensor:
    """Images of two domains, in turn: dark and bright."""
    images = proxies().float()
    images[::2] *= 0.2
    images[1::2] = 255 - 0.2 * images[1::2]
    return images.to(torch.uint8)


def expert(seed: int, images: Tensor) -> nn.Module:
    """A network whose batch norms remember these images, and whose logits grow with the distance from them."""
    module = net(seed)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        module(normalise(images))
    return module.eval()


def test_the_target_is_that_of_the_parent_whose_image_it_is() -> None:
    images = tinted()
    a, b = expert(1, images[::2]), expert(2, images[1::2])
    teachers = [Teacher("a", a), Teacher("b", b)]
    domains = whose([a, b], [(normalise(images),) * 2], ["a", "b"])
    assert domains is not None
    own = Teachers(teachers, normalise, "shared", typical=domains.typical)
    answers, shares = own.heard(images)
    assert shares is not None
    assert torch.equal(shares.argmax(1), torch.arange(len(images)) % 2)
    assert float(shares.amax(1).min()) > 0.9
    for i in (0, 1, 7):
        expected = shares[i, 0] * answers[0][i] + shares[i, 1] * answers[1][i]
        torch.testing.assert_close(own(images)[i], expected)
    plain = Teachers(teachers, normalise, "shared")
    assert torch.equal(plain(images), torch.stack(answers).mean(0))
    separate = Teachers(teachers, normalise, "separate", typical=domains.typical)
    assert torch.equal(separate(images), torch.cat(answers, 1))
    both, x = torch.cat(answers, 1), torch.randn(160, 8, generator=torch.Generator().manual_seed(0))
    heads = {"a": slice(0, 4), "b": slice(4, 8)}
    found = Objective(heads, "logits", SHORT).each(x, both, shares)
    alone = [Objective({"": slice(0, 4)}, "logits", SHORT).each(x[:, h], both[:, h]) for h in heads.values()]
    torch.testing.assert_close(found, shares[:, 0] * alone[0] + shares[:, 1] * alone[1])


def test_refining_towards_the_owners_answers_comes_closer_to_them() -> None:
    images = tinted()
    a, b = expert(1, images[::2]), expert(2, images[1::2])
    result = run(net(3), replace(SHORT, steps=60, targets="own"), a, b, images=images)
    mean = run(net(3), replace(SHORT, steps=60, targets="mean"), a, b, images=images)
    assert result.refined.loss < 0.9 * result.start.loss
    assert result.start.loss != mean.start.loss


def test_own_targets_need_batch_norms() -> None:
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), pooled_head(4, 4)).eval().requires_grad_(False)
    with pytest.raises(InputError) as caught:
        run(bare, replace(SHORT, targets="own"), bare, copy.deepcopy(bare))
    assert str(caught.value) == (
        'targets = "own" reads from batch norms whose image a proxy is, and a parent has none: set it to "mean"'
    )
