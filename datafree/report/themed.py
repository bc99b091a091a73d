"""SVG pictures that follow the page: their colours are the page's CSS variables, their ids their own."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# What matplotlib is told -> what the page shows. The stand-ins are colours that no picture uses.
INK, SOFT, GRID = "#0a0b0c", "#1a1b1c", "#2a2b2c"
OURS, REFINED, ORACLE, OTHER, ENSEMBLE = "#a00001", "#a00002", "#a00003", "#a00004", "#a00005"
PARENTS = ("#b00001", "#b00002", "#b00003")
POINTS = ("#c00001", "#c00002", "#c00003", "#c00004", "#c00005")  # networks of several sizes, light to dark
COLOURS = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    GRID: "var(--line)",
    OURS: "var(--ours)",
    REFINED: "var(--refined)",
    ORACLE: "var(--oracle)",
    OTHER: "var(--other)",
    ENSEMBLE: "var(--ink)",
    **{colour: f"var(--parent-{number})" for number, colour in enumerate(PARENTS)},
    **{colour: f"var(--point-{number})" for number, colour in enumerate(POINTS)},
}
DASHES = ("5 2", "7 2 2 2", "2 2", "9 3", "4 2 1 2 1 2")
MARKERS = "osD^v"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.hashsalt": "datafree",  # the same picture is the same text
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Key:
    """One entry of a legend that the page writes. dash: as SVG has it, "" unbroken, None for no line"""

    label: str
    colour: str
    dash: str | None = ""
    marker: Literal["dot", "cross", "none"] = "dot"

    @property
    def swatch(self) -> str:
        """A small drawing of the line."""
        colour = COLOURS[self.colour]
        line = f'<line x1="1" y1="6" x2="29" y2="6" stroke="{colour}" stroke-width="2" stroke-dasharray="{self.dash}"/>'
        markers = {
            "dot": f'<circle cx="15" cy="6" r="4" fill="{colour}"/>',
            "cross": f'<path d="M11 2L19 10M19 2L11 10" stroke="{colour}" stroke-width="2"/>',
            "none": "",
        }
        drawn = ("" if self.dash is None else line) + markers[self.marker]
        return f'<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true">{drawn}</svg>'


@dataclass(frozen=True)
class Picture:
    """svg: text that stands in the page        keys: its legend        wide: to be scrolled on a small screen"""

    svg: str
    keys: tuple[Key, ...] = ()
    wide: bool = False


def picture(
    name: str,
    alt: str,
    draw: Callable[[Axes], None],
    keys: tuple[Key, ...] = (),
    size: tuple[float, float] = (4.4, 3.0),
    wide: bool = False,
) -> Picture:
    """Draw on one pair of axes. name: unique in the page        alt: what a reader who cannot see it is told"""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(
            text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = text.getvalue()
    return Picture(_themed(svg[svg.index("<svg") :], name, alt), keys, wide)


def dashes(number: int) -> Any:
    """A line style of matplotlib's that looks like DASHES[number]."""
    return 0, tuple(float(part) for part in DASHES[number % len(DASHES)].split())


def _themed(svg: str, name: str, alt: str) -> str:
    width, height = (float(value) for value in re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0])
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(alt)}">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for stand_in, shown in COLOURS.items():
        svg = svg.replace(stand_in, shown)
    return svg
