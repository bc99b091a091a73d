"""The report page: one well-formed file that asks for nothing else, in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from datafree.report.charts import barrier_chart, residual_chart
from datafree.report.pages import html_report
from tests.datafree.report.made_up import results, run_record, sheets

VOID = {"meta", "img", "br", "hr", "link", "input", "wbr"}
LOADING = {"src", "href", "srcset", "data", "poster", "action", "xlink:href"}


class Checker(HTMLParser):
    """Every element is closed in its turn, ids are unique, nothing is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.pointers: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            value = value or ""
            self.ids[value] += name == "id"
            self.pointers |= set(re.findall(r"url\(#([^)]+)\)", value))
            if name in LOADING and value.startswith("#"):
                self.pointers.add(value[1:])
            elif name in LOADING and not value.startswith("data:image/"):
                self.wrong.append(f"{tag} loads {value[:60]}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing at line {self.getpos()[0]}")


def page() -> str:
    return html_report(results(), run_record(), "name: <tiny>\n", sheets())


def test_the_page_is_well_formed_and_asks_for_nothing() -> None:
    text, checker = page(), Checker()
    checker.feed(text)
    checker.close()
    assert checker.wrong == []
    assert checker.open == []
    assert [name for name, count in checker.ids.items() if count > 1] == []
    assert checker.pointers <= set(checker.ids), "every reference inside a picture has its target"
    assert not set(checker.tags) & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for outside in ("http:", "https:", "//www", "@import", "@font-face", "url(http", "expression("):
        assert outside not in text, outside


def test_every_part_of_a_run_is_on_the_page() -> None:
    text = page()
    for heading in ("The networks", "Accuracy against compute", "Task by task", "The proxy images", "Refining",
                    "Predicted and achieved", "Layer by layer", "Between the parents", "Widths", "Notes",
                    "Time and memory", "One forward pass", "How it was made"):  # fmt: skip
        assert f">{heading}</h" in text, heading
    assert text.count('class="ours own"') == 1, "one row is marked"
    assert "<td>88.0<small>84." in text, "an interval stands below its accuracy"
    assert text.count('<img class="sheet" src="data:image/') == 2
    assert "datafree merge x.yaml -o &lt;out&gt;" in text
    assert "<td>950</td>" in text
    assert "cd" * 32 in text
    assert "ef" * 32 in text
    assert "1.34" in text, "latency of one parent's"


def test_many_classes_are_told_by_their_worst_mistakes() -> None:
    text = html_report(results(classes=30), run_record(), "", ())
    assert "the mistakes made most" in text
    assert "rows are the right class" not in text


def test_pictures_follow_the_theme_and_do_not_change() -> None:
    drawn = [residual_chart(results()), barrier_chart(results())]
    again = [residual_chart(results()), barrier_chart(results())]
    assert drawn == again
    for one in drawn:
        assert one is not None
        assert "var(--ink)" in one.svg
        assert "#0a0b0c" not in one.svg, "no stand-in colour is left"
        assert "<svg viewBox" in one.svg


@pytest.mark.parametrize("width", [500, 1100])
def test_a_browser_shows_it_without_errors_and_sideways_scrolling(tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome here")
    probe = (
        "<script>addEventListener('load', () => {document.title = document.documentElement.scrollWidth + ' ' + "
        "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length + ' ' + "
        "[...document.images].filter(i => !i.naturalWidth).length})</script></body>"
    )
    path = tmp_path / "page.html"
    path.write_text(page().replace("</body>", probe))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command = [
        browser,
        *flags,
        f"--user-data-dir={tmp_path}/profile",
        f"--window-size={width},900",
        "--dump-dom",
    ]
    shown = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", shown.stdout)
    assert found is not None
    assert int(found[1]) <= width, "the page itself never scrolls sideways"
    assert (found[2], found[3]) == ("0", "0"), "nothing was fetched, every picture is shown"
