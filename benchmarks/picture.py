"""The README's picture: the curve of a finished run's report as a file.

python -m benchmarks.picture runs/quickstart docs/images/quickstart.svg
"""

from __future__ import annotations

import re
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(run: Path, out: Path) -> None:
    """Write the first chart of RUN/report.html to OUT."""
    chart = re.search(r"<svg.*?</svg>", (run / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    if chart is None:
        raise click.ClickException(f"{run / 'report.html'} holds no chart")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(chart.group() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
