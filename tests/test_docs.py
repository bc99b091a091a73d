"""Everything the documents say in code runs, everything they say in commands parses, every link leads somewhere."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

import datafree
from datafree.cli import main
from datafree.docs import COMMANDS, EXAMPLES, NOTEBOOK, RECIPE, SCHEMA, pages
from datafree.proxy import ProxySpec
from datafree.recipe.file import parse_recipe
from tests.conftest import PROJECT
from tests.datafree.library.small import PREPROCESS, inputs, pixels, small

DOCS = PROJECT / "docs"
PAGES = sorted(
    [*DOCS.glob("*.md"), *DOCS.glob("reference/*.md"), PROJECT / "README.md", PROJECT / "SECURITY.md"]
)
QUOTING = "add_an_op.md"  # quotes the sources, which are tested where they stand
RUN = [
    "tour.md",
    "models.md",
    "labels.md",
    "extending.md",
    "README.md",
]  # whose Python is run from top to bottom
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT))


def blocks(page: Path, language: str) -> list[str]:
    return [code for tag, code in _BLOCK.findall(page.read_text()) if tag == language]


@pytest.mark.parametrize("place", [RECIPE, COMMANDS, SCHEMA, NOTEBOOK])
def test_generated_pages_are_what_is_generated(place: str) -> None:
    assert (DOCS / place).read_text() == pages(DOCS)[place], "run `python -m datafree.docs` from the root"


def setting(tmp_path: Path) -> dict[str, Any]:
    """What the pages take for granted: two networks, images, a loader of pairs."""
    loader = DataLoader(TensorDataset(inputs(96), torch.arange(96) % 10), batch_size=32)
    x, y = inputs(20), torch.arange(20) % 10
    given = {
        "datafree": datafree,
        "torch": torch,
        "a": small(1),
        "b": small(2),
        "c": small(3),
        "x": x,
        "y": y,
    }
    return {
        **given,
        "images": pixels(96),
        "loader": loader,
        "preprocess": PREPROCESS,
        "out": str(tmp_path / "out"),
    }


@pytest.mark.parametrize("name", RUN)
def test_python_on_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PROJECT / name if name == "README.md" else DOCS / name
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"} if name == "tour.md" else {"__name__": "page", **setting(tmp_path)}
    with torch.random.fork_rng(devices=[]):
        for code in blocks(page, "python"):
            exec(compile(code, name, "exec"), names)  # noqa: S102


def test_every_page_with_python_is_run() -> None:
    shown = {page.name for page in PAGES if blocks(page, "python")}
    assert shown <= {*RUN, QUOTING}, "add the page to RUN"


def test_the_notebook_holds_the_tours_python() -> None:
    content = json.loads((DOCS / NOTEBOOK).read_text())
    code = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    assert code == [block.strip() for block in blocks(DOCS / "tour.md", "python")]
    assert content["nbformat"] == 4


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_on_a_page_are_recipes(page: Path) -> None:
    for text in blocks(page, "yaml"):
        content = yaml.safe_load(text)
        if "parents" in content:
            parse_recipe(text, page)
        elif "sources" in content:
            ProxySpec.model_validate(content)


def commands(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def parse(words: list[str]) -> None:
    """Raises for a command or an option that is none; nothing is run."""
    command = main.commands[words[1]]
    command.make_context(words[1], words[2:], parent=click.Context(main, info_name="datafree"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_on_a_page_are_commands(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)
    for text in blocks(page, "bash"):
        for words in commands(text):
            if words[0] == "datafree":
                parse(words)
            elif words[0] == "make":
                assert set(words[1:]) <= set(targets), words
            else:
                assert (
                    words[:1] == ["pip"]
                    or words[:2] in (["python", "-m"], ["git", "clone"])
                    or "=" in words[1]
                ), words


def test_every_command_has_an_example() -> None:
    assert set(EXAMPLES) == set(main.commands)
    for example in EXAMPLES.values():
        parse(shlex.split(example))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text()):
        if not link.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_site_has_every_page_once() -> None:
    content = yaml.safe_load((PROJECT / "mkdocs.yml").read_text())

    def files(nav: Any) -> Iterator[str]:
        for entry in nav:
            (value,) = entry.values()
            yield from [value] if isinstance(value, str) else files(value)

    listed = sorted(files(content["nav"]))
    there = sorted(
        str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if path.parent.name != "decisions"
    )
    assert listed == there, "name every page of docs/ under `nav` in mkdocs.yml"


def test_messages_on_the_page_of_errors_are_in_the_sources() -> None:
    sources = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text())
        for package in ("datafree", "pleas")
        for path in sorted((PROJECT / package).rglob("*.py"))
    )
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 10
    for message in rows:
        assert message in sources, message


def test_every_promise_names_a_test_that_exists() -> None:
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)` \|", (PROJECT / "SECURITY.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        path, _, name = row.partition("::")
        assert f"def {name}(" in (PROJECT / path).read_text(), row


def test_the_citation_can_be_read() -> None:
    content = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert content["cff-version"] == "1.2.0"
    assert content["license"] == "Apache-2.0"
    assert {"title", "message", "authors", "type"} <= set(content)
