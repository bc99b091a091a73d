"""`datafree.invert`, and proxies of any kind a caller may name or have."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from datafree.errors import UsageError
from datafree.library.images import Images, pictures_framed, take_images
from datafree.library.networks import Networks, Prepared, take_networks
from datafree.library.quiet import Said, checked, shown, undisturbed
from datafree.progress import StageProgress
from datafree.proxy import SOURCES, ProxySpec, build_proxies
from datafree.proxy.kinds.inversion import InversionSpec
from datafree.stages.parents import LoadedParents
from datafree.stages.work import choose_device

COUNT = 512  # proxies that are made where the caller does not say how many


def invert(
    parents: Networks,
    count: int = COUNT,
    *,
    preprocess: Prepared | Mapping[str, Prepared] = None,
    loss: Literal["statistics", "classes"] = "statistics",
    steps: int | Literal["auto"] = "auto",
    device: str = "auto",
    seed: int = 0,
    progress: Said = False,
    **settings: Any,
) -> Images:
    """Images inverted from trained networks: what to merge on when there are no data.

    The statistics that batch norms stored are what the images are made to have; networks without batch norm are asked
    for images that they take for their classes (`loss="classes"`). Nothing is written to disk.

    parents:    two or more networks, in a list or by name; none of them is changed
    count:      how many images, dealt to the networks in turn
    preprocess: size in pixels, mean and std for pixels from 0 to 1, as `{"size": 32, "mean": [...], "std": [...]}`, for
                all networks or by name; timm's models say it themselves
    steps:      of Adam, "auto": until the statistics fit as well as those of as many real images would
    settings:   further keys of a recipe's source of kind inversion
    Returns uint8 pixels (count, C, H, W), with what to know of them under `notes`. Raises UsageError for networks that
    cannot be inverted and for settings that are none, RunError where the descent gives no finite images.
    Source: DeepInversion (arXiv 1912.08795), without labels and with scale-free statistics.

    >>> images = datafree.invert([a, b], 8, preprocess={"size": 8, "mean": [0.5], "std": [0.25]}, steps=2)
    >>> images
    Images(8 of inversion, 1x8x8, uint8 pixels)
    """
    spec = checked(InversionSpec, {**settings, "loss": loss, "steps": steps}, "invert")
    place, said = choose_device(device), shown(progress)
    with said, undisturbed(place):
        loaded = take_networks(parents, preprocess, None)
        return make_images(loaded, (spec,), count, seed, place, said)


def named_sources(proxies: Any) -> tuple[Any, ...] | None:
    """What sections of a recipe's proxy.sources `proxies` names; None where it holds images instead."""
    if isinstance(proxies, str):
        if proxies not in SOURCES:
            raise UsageError(
                f"proxies={proxies!r} is no kind of proxies: it is one of {', '.join(sorted(SOURCES))}, or images"
            )
        return _sections([{"kind": proxies}])
    if isinstance(proxies, Mapping):
        if "kind" not in proxies:
            raise UsageError(
                "proxies is a mapping without `kind`: give {'kind': 'inversion', 'steps': 200}, or images"
            )
        return _sections([dict(proxies)])
    if isinstance(proxies, list | tuple) and proxies and all(isinstance(x, Mapping) for x in proxies):
        return _sections([dict(x) for x in proxies])
    return None


def _sections(sources: list[Any]) -> tuple[Any, ...]:
    return checked(ProxySpec, {"count": 1, "sources": sources}, "proxies").sources


def make_images(
    loaded: LoadedParents,
    sources: tuple[Any, ...],
    count: int,
    seed: int,
    device: torch.device,
    progress: StageProgress,
) -> Images:
    """Proxies of the given sources, made now and kept in memory."""
    spec = checked(ProxySpec, {"count": count, "sources": sources}, "proxies")
    with progress.stage("proxies"), tempfile.TemporaryDirectory(prefix="datafree-") as folder:
        found = build_proxies(
            spec, loaded.each, seed, Path(folder), Path.cwd(), progress=progress, device=str(device)
        )
        values = torch.cat(list(found.batches(256)))
    return Images(
        values,
        source=" and ".join(dict.fromkeys(report.kind for report in found.manifest)),
        sources=tuple(found.source_names) if len(found.manifest) > 1 else (),
        facts={report.kind: dict(report.facts) for report in found.manifest},
        notes=found.notes,
    )


def given_images(proxies: Any, what: str, count: int | None) -> Images | list[Image.Image] | None:
    """The images that `proxies` holds, PIL images unframed; None where it names a kind of proxies."""
    return None if named_sources(proxies) is not None else take_images(proxies, what, count)


def images_for(
    loaded: LoadedParents,
    proxies: Any,
    given: Images | list[Image.Image] | None,
    count: int | None,
    seed: int,
    device: torch.device,
    progress: StageProgress,
) -> Images:
    """`given`, PIL images framed for the parents; or those that `proxies` names, made now."""
    if given is None:
        sources = named_sources(proxies)
        assert sources is not None
        return make_images(loaded, sources, COUNT if count is None else count, seed, device, progress)
    if isinstance(given, Images):
        return given
    return pictures_framed(given, loaded.input.size, loaded.input.channels)
