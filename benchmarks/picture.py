"""The README's picture: the first chart of a finished run's report as a file of its own, legend included.

python -m benchmarks.picture runs/quickstart docs/images/quickstart.svg
"""

from __future__ import annotations

import re
from html import unescape
from importlib.resources import files
from pathlib import Path
from xml.sax.saxutils import escape

import click

COLUMNS, ROW = 2, 15  # of the legend; the height of a line


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(run: Path, out: Path) -> None:
    """Write the first chart of RUN/report.html to OUT."""
    page = (run / "report.html").read_text(encoding="utf-8")
    chart = re.search(r'<svg viewBox="0 0 (\S+) (\S+)"[^>]*>(.*?)</svg>', page, re.DOTALL)
    if chart is None:
        raise click.ClickException(f"{run / 'report.html'} holds no chart")
    listed = re.search(r'<ul class="keys">(.*?)</ul>', page[chart.end() :], re.DOTALL)
    keys = re.findall(r"<svg[^>]*>(.*?)</svg>(.*?)</li>", listed.group(1), re.DOTALL) if listed else []
    width, height = float(chart.group(1)), float(chart.group(2))
    total = height + ROW * -(-len(keys) // COLUMNS) + 6
    css = (files("datafree.report") / "templates" / "report.css").read_text(encoding="utf-8")
    colours = css[: css.index("body {")]  # the variables, light and dark
    entries = [
        f'<g transform="translate({10 + width / COLUMNS * (i % COLUMNS):g} {height + ROW * (i // COLUMNS):g})">{drawn}'
        f'<text x="34" y="9.5" font-size="9" fill="var(--ink)">{escape(unescape(label).strip())}</text></g>'
        for i, (drawn, label) in enumerate(keys)
    ]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {total:g}" width="{2 * width:g}" font-family="DejaVu Sans, Verdana, sans-serif">',
        f"<style>{colours}</style>",
        '<rect width="100%" height="100%" fill="var(--ground)"/>',
        chart.group(3),
        *entries,
        "</svg>",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
