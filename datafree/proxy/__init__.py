"""Proxy inputs: the images a merge is computed from when there are no data.

spec = ProxySpec(count=768, sources=(InversionSpec(),))
proxies = build_proxies(spec, parents, seed=0, cache=folder, base=folder)
for images in proxies.batches(64): ...        # uint8 (n, channels, height, width)
"""

from __future__ import annotations

# Every import of a source registers its kind; they come before `build`, whose recipe section lists the kinds.
from datafree.proxy.kinds.diffusion import DiffusionSpec
from datafree.proxy.kinds.images import ImagesSpec
from datafree.proxy.kinds.inversion import InversionSpec
from datafree.proxy.kinds.noise import NoiseSpec
from datafree.proxy.kinds.procedural import ProceduralSpec

from datafree.proxy.build import (  # isort: skip
    ProxySet,
    ProxySpec,
    SourceReport,
    build_proxies,
    check_proxies,
    common_input,
    find_proxies,
)
from datafree.proxy.sheet import contact_sheet, export_folder  # isort: skip
from datafree.proxy.source import SHARD, SOURCES, Request, Shard, Source, SourceSpec, register

__all__ = [
    "SHARD",
    "SOURCES",
    "DiffusionSpec",
    "ImagesSpec",
    "InversionSpec",
    "NoiseSpec",
    "ProceduralSpec",
    "ProxySet",
    "ProxySpec",
    "Request",
    "Shard",
    "Source",
    "SourceReport",
    "SourceSpec",
    "build_proxies",
    "check_proxies",
    "common_input",
    "contact_sheet",
    "export_folder",
    "find_proxies",
    "register",
]
