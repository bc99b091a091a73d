"""From the table of a run to one sentence: which network, what it is worth, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from datafree.evaluation.results import Results, Row, Verdict, average_of

ENOUGH = 0.95  # share of the ensemble from which on nothing is wanting
FEW = 64  # held-out proxies, below which an agreement says little
WHOLE = 0.98  # of the parents' number: a network of that many multiply-adds is the ensemble itself
GAIN = 0.005  # of accuracy or agreement, below which one network is no better than another

Measure = Literal["accuracy", "agreement"]


def verdict(results: Results, looks: Mapping[str, str], *, refined: bool) -> Verdict | None:
    """Judge the networks that a run leaves, by accuracy where there are tasks, else by held-out proxies.

    looks:   source of proxies -> what it looks like to the parents: good, fair or poor
    refined: whether the recipe asks for refining
    None where no network can be compared with the ensemble, as with tasks that only some heads answer.
    """
    measure: Measure = "accuracy" if results.tasks else "agreement"
    ours = results.of_kind("refined") or results.of_kind("merged")
    known = [row for row in ours if value_of(results, row, measure) is not None]
    ensemble = next(iter(results.of_kind("ensemble")), None)
    best_known = None if ensemble is None else value_of(results, ensemble, measure)
    if ensemble is None or best_known is None or not known:
        return None
    chosen = _chosen(results, known, measure, best_known, ensemble.ratio)
    value = _value(results, chosen, measure)
    images = 0 if ensemble.fidelity is None else ensemble.fidelity.images
    alone = _better_alone(results, known, measure)
    reached = value >= ENOUGH * best_known > 0
    own = ensemble.fidelity is not None and ensemble.fidelity.own is not None
    whom = "the parent whose image it is" if own else "the parents"
    where = "" if measure == "accuracy" else f" with {whom} on {images} held-out proxies"
    near = f"is the smallest network within {100 * (1 - ENOUGH):.0f} % of the ensemble"
    sentence = (
        f"{chosen.label} {near if reached else 'comes closest to the ensemble'}: {measure} {100 * value:.1f} %{where}, "
        f"{_share(value, best_known)} of the ensemble's {100 * best_known:.1f} %, at {chosen.ratio:.2f} times one "
        f"parent's multiply-adds; {_proxies(looks)}"
    )
    steps = [text for text in (alone, _contradiction(results, ensemble, measure)) if text]
    if not reached:
        steps += _remedies(results, chosen, known, measure, best_known, looks, ensemble.ratio, refined)
    elif measure == "agreement" and _worst(looks) == "poor":
        steps.append(_better_proxies(looks))
    if measure == "agreement":
        steps += _caution(images)
    return Verdict(chosen, measure, value, best_known, images, dict(looks), sentence, tuple(steps))


def value_of(results: Results, row: Row, measure: Measure) -> float | None:
    """What a network is judged by; None for a parent that does not answer everything."""
    if measure == "accuracy":
        return average_of(results, row)
    close = row.fidelity
    whole = close is not None and len(close.agreement) == len(results.of_kind("parent"))
    if close is None or not whole:
        return None
    return close.mean_agreement if close.own is None else close.own


def _value(results: Results, row: Row, measure: Measure) -> float:
    found = value_of(results, row, measure)
    assert found is not None
    return found


def _chosen(results: Results, known: Sequence[Row], measure: Measure, ensemble: float, parents: float) -> Row:
    """The smallest network that is near the ensemble, else the best one; one as large as the ensemble only alone."""
    merged = [row for row in known if row.ratio < WHOLE * parents] or list(known)
    by_size = sorted(merged, key=lambda row: row.ratio)
    near = [row for row in by_size if _value(results, row, measure) >= ENOUGH * ensemble]
    return near[0] if near else max(by_size, key=lambda row: _value(results, row, measure))


def _better_alone(results: Results, known: Sequence[Row], measure: Measure) -> str | None:
    """A sentence about a parent that is better than every merged network; None where there is none."""
    best = max(_value(results, row, measure) for row in known)
    alone = [row for row in results.of_kind("parent") if value_of(results, row, measure) is not None]
    if not alone:
        return None
    row = max(alone, key=lambda row: _value(results, row, measure))
    value = _value(results, row, measure)
    if value <= best or (measure == "agreement" and _lowest(row) <= max(map(_lowest, known))):
        return None
    return (
        f"{row.title} alone has {measure} {100 * value:.1f} %, more than every merged network: take it where one "
        "network must serve"
    )


def _contradiction(results: Results, ensemble: Row, measure: Measure) -> str | None:
    """A sentence where the ensemble, which a merge can hardly exceed, is nothing to aim at."""
    value = _value(results, ensemble, measure)
    if measure == "agreement":
        if value >= 0.5:
            return None
        return (
            f"Even the ensemble agrees with its parents on {100 * value:.0f} % of the proxies: the parents contradict "
            "each other there"
        )
    known = [value_of(results, row, measure) for row in results.of_kind("parent")]
    if not any(alone is not None and alone >= value for alone in known):
        return None
    return "The ensemble itself is no better than one parent alone: these parents do not complete each other"


def _lowest(row: Row) -> float:
    return 0.0 if row.fidelity is None else min(row.fidelity.agreement.values())


def _remedies(
    results: Results,
    chosen: Row,
    known: Sequence[Row],
    measure: Measure,
    ensemble: float,
    looks: Mapping[str, str],
    parents: float,
    refined: bool,
) -> list[str]:
    value, steps = _value(results, chosen, measure), []
    real = [row for row in results.of_kind("oracle") if row.point == chosen.point]
    limit = value_of(results, real[0], measure) if real and measure == "accuracy" else None
    if limit is not None and limit < value + GAIN:
        steps.append(
            f"Real images would give {100 * limit:.1f} % here: the size is the limit, not the proxies"
        )
    elif limit is not None:
        steps.append(f"Real images would give {100 * limit:.1f} % here: {_lower(_better_proxies(looks))}")
    else:
        steps.append(_better_proxies(looks))
    larger = any(chosen.ratio + 0.01 < row.ratio < WHOLE * parents for row in known)
    if not larger and chosen.ratio < WHOLE * parents:
        steps.append(f"Try a larger budget: merge.budgets go up to {parents:g}")
    if not refined and _worst(looks) != "poor":
        steps.append("Refining on the proxies may close part of the gap: add `refine: {}` to the recipe")
    return steps


def _better_proxies(looks: Mapping[str, str]) -> str:
    inverted = any(source.endswith(" inversion") for source in looks)
    if _worst(looks) == "good":
        return "More proxies may help: raise proxy.count, or mix in photographs (a source of kind: images)"
    if inverted:
        return (
            "Better proxies come first: photographs of any kind (a source of kind: images), or more inverted images "
            "(proxy.count) with more steps (max_steps); see `datafree diagnose`"
        )
    return (
        "Better proxies come first: images inverted from the parents (a source of kind: inversion) or photographs of "
        "any kind (kind: images); see `datafree diagnose`"
    )


def _caution(images: int) -> list[str]:
    few = "" if images >= FEW else f", and {images} images are few: raise proxy.count"
    return [f"No labels were given: accuracy is not known before there are tasks under `evaluate`{few}"]


def _worst(looks: Mapping[str, str]) -> str:
    return next((look for look in ("poor", "fair") if look in looks.values()), "good")


def _proxies(looks: Mapping[str, str]) -> str:
    if len(set(looks.values())) == 1:
        return f"the proxies look {next(iter(looks.values()))} to the parents"
    return "of the proxies " + ", ".join(f"{source} looks {look}" for source, look in looks.items())


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _share(value: float, ensemble: float) -> str:
    return f"{100 * value / ensemble:.0f} %" if ensemble else "-"
