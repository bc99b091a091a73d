"""`datafree env`: what a bug report should begin with."""

from __future__ import annotations

import click

from datafree.cache.limit import LIMIT_VARIABLE, limit_bytes
from datafree.cache.store import CACHE_VARIABLE, Store, cache_folder
from datafree.environment import machine, versions
from datafree.text import json_text


def run(as_json: bool) -> None:
    store = Store(cache_folder())
    facts = {
        "versions": versions(),
        "machine": machine(),
        "cache": {"folder": str(store.root), "bytes": store.size(), "limit": limit_bytes()},
    }
    if as_json:
        click.echo(json_text(facts), nl=False)
        return
    for name, number in facts["versions"].items():
        click.echo(f"{name:<12} {number}")
    here = facts["machine"]
    click.echo(
        f"{'machine':<12} {here['platform']}, {here['cores']} cores, torch uses {here['threads']} threads"
    )
    click.echo(f"{'devices':<12} {', '.join(['cpu', *here['cuda']])}")
    size, most = (facts["cache"][key] / 1e9 for key in ("bytes", "limit"))
    click.echo(f"{'cache':<12} {store.root} ({size:.2f} GB; {CACHE_VARIABLE} moves it)")
    click.echo(f"{'':<12} shards and statistics unused for longest go above {most:g} GB ({LIMIT_VARIABLE})")
