"""The command line. Only click is imported here; each command imports its work when it runs: help is instant.

A new command is one file in `datafree/commands` and one function below. Exit codes: 0 done, 1 a run that
failed, 2 the caller's mistake, 130 and 143 interrupted by Ctrl-C and by SIGTERM; all but 0 print one message. A bug
keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from datafree.errors import DatafreeError


class Terminated(KeyboardInterrupt):
    """SIGTERM, which unwinds as Ctrl-C does, so that no half-written file is left."""


class Commands(click.Group):
    """Turns the errors we raise on purpose, and interruptions, into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminable():
                return super().invoke(ctx)
        except KeyboardInterrupt as interruption:
            _say(_interrupted(ctx.invoked_subcommand))
            ctx.exit(128 + (signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK:
                _say(f"error: {_disk_failed(error, ctx.invoked_subcommand)}")
                ctx.exit(1)
            code = _exit_code(error)
            if code is None:
                raise
            _say(f"error: {error}")
            ctx.exit(code)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Commands that work on a recipe all say what they are doing, in the same ways."""
        if any(parameter.name == "recipe" for parameter in cmd.params):
            cmd.params += [option for option in _said() if option.name not in {p.name for p in cmd.params}]
        super().add_command(cmd, name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of this file, which is the order of use


def _said() -> list[click.Option]:
    """-q, -v and --log-file, which `datafree.progress.progress_on` reads."""

    def keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        ctx.meta[f"datafree.{parameter.name}"] = value
        if ctx.meta.get("datafree.quiet") and ctx.meta.get("datafree.verbose"):
            raise click.UsageError("-q and -v are given together: give one of them", ctx)

    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=keep,
            help="Show no progress and no notes.",
        ),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=keep,
            help="Show more of it, in lines.",
        ),
        click.Option(
            ["--log-file"],
            type=click.Path(dir_okay=False),
            expose_value=False,
            callback=keep,
            help="Also append progress to this file.",
        ),
    ]


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error raised on purpose, None for a bug."""
    if isinstance(error, DatafreeError):
        return error.exit_code
    pleas = sys.modules.get("pleas.errors")  # an error of pleas can only exist once pleas was imported
    if pleas is not None and isinstance(error, pleas.PleasError):
        return 2 if isinstance(error, pleas.InputError) else 1
    return None


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # what a disk may do to any write


def _disk_failed(error: OSError, command: str | None) -> str:
    """What is said of a write that failed where nobody expected it."""
    kept = "; finished stages are kept" if command in KEEPS else ""
    where = "a file" if error.filename is None else error.filename
    return (
        f"{where} could not be written or read ({error.strerror}): free space or mend the disk, and run the same "
        f"command again{kept}"
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated inside; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


KEEPS = (
    "plan",
    "merge",
    "diagnose",
    "proxy",
    "ablate",
)  # commands whose finished stages are kept in the cache


def _interrupted(command: str | None) -> str:
    """What is left of an interrupted command, and how to go on."""
    if command not in KEEPS:
        return "interrupted: nothing was changed"
    cache_folder = getattr(
        sys.modules.get("datafree.cache.store"), "cache_folder", None
    )  # it may not be imported yet
    where = "" if cache_folder is None else f" in {cache_folder()}"
    output = "; the output folder was not touched" if command in ("merge", "proxy") else ""
    if command == "ablate":
        output = ", the finished cells and their rows in the output folder"
    return (
        f"interrupted: the stages and proxy images that were finished are kept{where}{output}. Run the same command "
        "again to go on from there"
    )


def _say(message: str) -> None:
    """To standard error; in a terminal broken between words."""
    from datafree.tables import output_width, wrapped

    click.echo(wrapped(message, output_width(sys.stderr)), err=True)


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

RECIPE: Decorator = click.argument("recipe", type=click.Path(dir_okay=False))
SETTINGS: Decorator = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, for example --set proxy.count=256 (may be repeated).",
)


def _device(ctx: click.Context, parameter: click.Parameter, name: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", name) is None:
        raise click.BadParameter(f"{name!r} is none of auto, cpu, cuda, cuda:0, cuda:1, ...", ctx, parameter)
    return name


DEVICE: Decorator = click.option(
    "--device",
    metavar="[auto|cpu|cuda|cuda:N]",
    default="auto",
    show_default=True,
    callback=_device,
    help="Where the networks run; cuda:N is one of several GPUs.",
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
@JSON
def merge(
    recipe: str,
    out: str | None,
    overwrite: bool,
    export: bool,
    settings: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Merge the parents that RECIPE names and compare the result with them."""
    from datafree.commands import merge

    merge.run(recipe, out, settings, device, overwrite, export, sys.argv, as_json)


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
@JSON
def proxy(
    recipe: str,
    out: str,
    overwrite: bool,
    png: bool,
    shown: int,
    settings: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Make the proxies of RECIPE, or find them in the cache, and show them: contact sheets, statistics, cost."""
    from datafree.commands import proxy

    proxy.run(recipe, out, settings, device, overwrite, png, shown, as_json)


@main.command()
@click.argument("grid", type=click.Path(dir_okay=False))
@click.option(
    "-o", "--out", required=True, type=click.Path(), help="Output folder; what it holds is gone on with."
)
@click.option("--only", multiple=True, metavar="AXIS=LABEL", help="Run a part of the grid (may be repeated).")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 256), help="Cells at a time.")
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Of every cell; when left out 1 with several jobs, all with one.",
)
@click.option("--dry-run", is_flag=True, help="Show the cells and how long they will take; run none.")
@click.option("--networks", is_flag=True, help="Keep the merged networks of every cell as well.")
@SETTINGS
@DEVICE
@OFFLINE
def ablate(
    grid: str,
    out: str,
    only: tuple[str, ...],
    jobs: int,
    threads: int | None,
    dry_run: bool,
    networks: bool,
    settings: tuple[str, ...],
    device: str,
) -> None:
    """Run every cell of GRID, a recipe with axes, and compare them in one table and one report."""
    from datafree.commands import ablate

    ablate.run(grid, out, settings, only, device, jobs, threads, dry_run, networks, sys.argv)


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
def methods(as_json: bool) -> None:
    """List the methods that a recipe's `compare` can name: what each is, what it needs, its keys."""
    from datafree.commands import methods

    methods.run(as_json)


@main.command()
@JSON
def env(as_json: bool) -> None:
    """Show versions, devices, threads, and where the cache is and how large."""
    from datafree.commands import env

    env.run(as_json)
