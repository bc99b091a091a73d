"""`datafree env`: what a bug report should begin with."""

from __future__ import annotations

import click

from datafree.environment import machine, versions
from datafree.report import json_text
from datafree.store import CACHE_VARIABLE, Store, cache_folder


def run(as_json: bool) -> None:
    store = Store(cache_folder())
    facts = {
        "versions": versions(),
        "machine": machine(),
        "cache": {"folder": str(store.root), "bytes": store.size()},
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
    click.echo(
        f"{'cache':<12} {store.root} ({facts['cache']['bytes'] / 1e6:.1f} MB; set {CACHE_VARIABLE} to "
        "move it)"
    )
