"""One cell: a run of the pipeline, of which the readable part and one row per network are kept."""

from __future__ import annotations

import shutil
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pleas
from datafree import pipeline
from datafree.ablate.book import BUILDING, CELLS, Entry, unwritable
from datafree.ablate.grid import Cell
from datafree.cache.store import code_fingerprint
from datafree.errors import DatafreeError
from datafree.evaluation.results import Results, Row
from datafree.pipeline import METRICS, RECORD, REPORT, RESOLVED, Outcome
from datafree.progress import StageProgress

KEPT = (METRICS, RECORD, REPORT, RESOLVED)


@dataclass(frozen=True)
class Runner:
    """Runs cells. folder: of the grid    networks: whether the merged networks are kept as well"""

    folder: Path
    device: str = "auto"
    networks: bool = False
    command: Sequence[str] = ()

    def __call__(self, cell: Cell, progress: StageProgress | None = None) -> Entry:
        """How the cell ended. Whatever its run raises is a failed cell; only an interruption goes on from here."""
        started, error, trace = time.perf_counter(), "", ""
        rows: list[dict[str, Any]] = []
        scores: dict[str, float] = {}
        notes: list[str] = []
        progress = progress or StageProgress()
        try:
            building = Path(tempfile.mkdtemp(prefix=BUILDING, dir=self.folder))
        except OSError as full:
            raise unwritable(self.folder, full) from full
        try:
            outcome = pipeline.run(
                cell.recipe, building / "out", device=self.device, progress=progress, command=self.command
            )
            rows, scores, notes = rows_of(outcome), scores_of(outcome), list(outcome.results.notes)
            self._keep(cell, outcome.folder)
        except (DatafreeError, pleas.PleasError) as known:
            error = str(known)
        except Exception as bug:  # noqa: BLE001 - the other cells do not depend on it; it is told with its traceback
            error, trace = f"{type(bug).__name__}: {bug}", traceback.format_exc()
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return Entry(
            cell=cell.fingerprint,
            status="failed" if error else "done",
            labels=dict(cell.labels),
            seed=cell.seed,
            seconds=round(time.perf_counter() - started, 3),
            code=code_fingerprint(),
            rows=rows,
            scores=scores,
            timings={stage: round(spent, 3) for stage, spent in progress.timings.items()},
            error=error,
            trace=trace,
            notes=notes,
        )

    def _keep(self, cell: Cell, out: Path) -> None:
        """Move what is kept of a finished run to its place."""
        place = self.folder / CELLS / cell.fingerprint[:16]
        place.parent.mkdir(exist_ok=True)
        if not self.networks:
            for item in out.iterdir():
                if item.name in KEPT:
                    continue
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        shutil.rmtree(place, ignore_errors=True)
        (out / RESOLVED).write_text(cell.recipe.resolved(place), encoding="utf-8")
        out.replace(place)


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    """One row per network of a run, JSON-able: what it is, what it costs and how good it is."""
    return [_row(outcome.results, row) for row in outcome.results.rows]


def scores_of(outcome: Outcome) -> dict[str, float]:
    """What the diagnosis of a run said of its proxies: the mean over sources, weighted by their images."""
    found = outcome.record["proxies"]["diagnosis"]
    scores = {name: float(found[name]) for name in ("effective_rank", "dead_directions")}
    for name in ("spread", "bn_log_var", "agreement"):
        if all(source[name] is not None for source in found["sources"]):
            images = sum(source["images"] for source in found["sources"])
            scores[name] = sum(source[name] * source["images"] for source in found["sources"]) / images
    return scores


def _row(results: Results, row: Row) -> dict[str, Any]:
    scores = [row.evaluation.score(task) for task in results.tasks]
    plan = results.plans.get(row.point, {}) if row.point is not None and row.kind == "merged" else {}
    return {
        "kind": row.kind,
        "network": row.title,
        "point": None if row.point is None else {"kind": row.point.kind, "value": row.point.value},
        "tasks": {score.task: score.accuracy for score in scores if score is not None},
        "average": row.evaluation.average if all(score is not None for score in scores) else None,
        "joint": row.evaluation.joint,
        "predicted": row.predicted,
        "propagate": plan.get("propagate"),
        "ratio": row.ratio,
        "flops": row.flops,
        "parameters": row.parameters,
        "note": row.note,
    }
