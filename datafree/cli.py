"""The command line. Only click is imported here; each command imports its work when it runs: help is instant.

A new command is one file in `datafree/commands` and one function below. Exit codes: 0 done, 1 a run that
failed, 2 the caller's mistake; the last two print one message. A bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import click

from datafree.errors import DatafreeError


class Commands(click.Group):
    """Turns the errors we raise on purpose into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of this file, which is the order of use


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error raised on purpose, None for a bug."""
    if isinstance(error, DatafreeError):
        return error.exit_code
    pleas = sys.modules.get("pleas.errors")  # an error of pleas can only exist once pleas was imported
    if pleas is not None and isinstance(error, pleas.PleasError):
        return 2 if isinstance(error, pleas.InputError) else 1
    return None


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

RECIPE: Decorator = click.argument("recipe", type=click.Path(dir_okay=False))
SETTINGS: Decorator = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, for example --set proxy.count=256 (may be repeated).",
)
DEVICE: Decorator = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the networks run.",
)
JSON: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def _go_offline(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    """For the time of this command; a variable, because the libraries that fetch files read one too."""
    if not asked:
        return
    before = {name: os.environ.get(name) for name in ("DATAFREE_OFFLINE", "HF_HUB_OFFLINE")}
    os.environ.update(dict.fromkeys(before, "1"))

    def restore() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    ctx.call_on_close(restore)


OFFLINE: Decorator = click.option(
    "--offline",
    is_flag=True,
    expose_value=False,
    callback=_go_offline,
    help="Fetch nothing from the network, whatever the recipe allows; the same as DATAFREE_OFFLINE=1.",
)


def _version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        import datafree

        click.echo(f"datafree {datafree.__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
)
def main() -> None:
    """Merge two trained vision networks of one architecture into one, without their training data."""


@main.command()
@RECIPE
@SETTINGS
@DEVICE
@OFFLINE
@JSON
def check(recipe: str, settings: tuple[str, ...], device: str, as_json: bool) -> None:
    """Find everything that would stop RECIPE, in seconds and without making anything."""
    from datafree.commands import check

    check.run(recipe, settings, device, as_json)


@main.command()
@RECIPE
@SETTINGS
@DEVICE
@OFFLINE
@JSON
def plan(recipe: str, settings: tuple[str, ...], device: str, as_json: bool) -> None:
    """Show which units would be fused, at what cost and with what predicted error; write nothing."""
    from datafree.commands import plan

    plan.run(recipe, settings, device, as_json)


@main.command()
@RECIPE
@click.option("-o", "--out", type=click.Path(), help="Output folder; the recipe's name when left out.")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that datafree wrote before.")
@click.option("--export", is_flag=True, help="Also write a torch.export program (.pt2) and ONNX.")
@SETTINGS
@DEVICE
@OFFLINE
def merge(
    recipe: str, out: str | None, overwrite: bool, export: bool, settings: tuple[str, ...], device: str
) -> None:
    """Merge the parents that RECIPE names and compare the result with them."""
    from datafree.commands import merge

    merge.run(recipe, out, settings, device, overwrite, export, sys.argv)


@main.command()
@RECIPE
@click.option(
    "--real",
    metavar="REF",
    help="Compare with real images: `oracle` (the recipe's), a folder, or FILE.npz, FILE.npz:KEY.",
)
@click.option(
    "--real-count",
    default=512,
    show_default=True,
    type=click.IntRange(min=2),
    help="Use at most so many of them.",
)
@SETTINGS
@DEVICE
@OFFLINE
@JSON
def diagnose(
    recipe: str, real: str | None, real_count: int, settings: tuple[str, ...], device: str, as_json: bool
) -> None:
    """Tell how good the proxies of RECIPE are, source by source, before anything is merged."""
    from datafree.commands import diagnose

    diagnose.run(recipe, real, real_count, settings, device, as_json)


@main.command()
@RECIPE
@click.option("-o", "--out", required=True, type=click.Path(), help="Output folder.")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that datafree wrote before.")
@click.option("--png", is_flag=True, help="Also write every image as PNG, in OUT/images.")
@click.option("--shown", default=128, show_default=True, type=click.IntRange(min=1), help="Images per sheet.")
@SETTINGS
@DEVICE
@OFFLINE
def proxy(
    recipe: str, out: str, overwrite: bool, png: bool, shown: int, settings: tuple[str, ...], device: str
) -> None:
    """Make the proxies of RECIPE, or find them in the cache, and show them: contact sheets, statistics, cost."""
    from datafree.commands import proxy

    proxy.run(recipe, out, settings, device, overwrite, png, shown)


@main.command()
@click.argument("target", metavar="RECIPE|MODEL|FOLDER")
@click.option(
    "--argument", "arguments", multiple=True, metavar="KEY=VALUE", help="An argument of the model's builder."
)
@click.option("--input", "shape", metavar="CxHxW", help="Input of a model reference, for example 3x224x224.")
@click.option("--strict", is_flag=True, help="Refuse operations that no symmetry rule covers.")
@JSON
def inspect(target: str, arguments: tuple[str, ...], shape: str | None, strict: bool, as_json: bool) -> None:
    """Show the symmetry of a model (which parameters move together), or what an artefact says of itself."""
    from datafree.commands import inspect

    inspect.run(target, arguments, shape, strict, as_json)


@main.command("eval")
@click.argument("folder", type=click.Path(file_okay=False))
@RECIPE
@SETTINGS
@DEVICE
@JSON
def evaluate(folder: str, recipe: str, settings: tuple[str, ...], device: str, as_json: bool) -> None:
    """Evaluate the artefact in FOLDER on the tasks of RECIPE."""
    from datafree.commands import evaluate

    evaluate.run(folder, recipe, settings, device, as_json)


@main.command()
@JSON
def env(as_json: bool) -> None:
    """Show versions, devices, threads, and where the cache is and how large."""
    from datafree.commands import env

    env.run(as_json)
