"""What the proxies of a run look like to its parents: the scores that cost one forward pass."""

from __future__ import annotations

from typing import Any

import pleas
from datafree.diagnosis.observe import agreement, watch
from datafree.diagnosis.ranking import light
from datafree.diagnosis.spectra import ranks
from datafree.proxy import ProxySet
from datafree.stages.parents import LoadedParents
from datafree.stages.work import Work


def judge_proxies(
    work: Work, parents: LoadedParents, proxies: ProxySet, evidence: pleas.Evidence
) -> dict[str, Any]:
    """Scores per source, and ranks of all images together; `datafree diagnose` says more, and ranks the sources."""
    batch = work.recipe.recipe.merge.batch
    sources, kinds = [], [report.kind for report in proxies.manifest]
    with work.progress.stage("diagnosis"):
        for number, kind in enumerate(kinds):
            images = proxies.source(number)
            seen = [
                watch(parent, images.batches(batch), work.device).observation() for parent in parents.each
            ]
            known = [one.bn_log_var for one in seen if one.bn_log_var is not None]
            distance = sum(known) / len(known) if known else None
            spread = sum(one.spread for one in seen) / len(seen)
            sources.append(
                {
                    "source": f"{number + 1} {kind}",
                    "images": len(images),
                    "looks": light(distance, spread),
                    "bn_log_var": distance,
                    "spread": spread,
                    "agreement": agreement(seen) if work.recipe.recipe.labels == "shared" else None,
                }
            )
            work.progress("diagnosis", number + 1, len(kinds))
        found = [rank for of_parent in ranks(evidence.parents, evidence.statistics) for rank in of_parent]
    return {
        "sources": sources,
        "effective_rank": sum(rank.effective / rank.size for rank in found) / len(found),
        "dead_directions": sum(rank.dead for rank in found),
    }
