# ruff: noqa: E501 - messages stand here as they are printed
"""Recipes: every mistake located and explained, overrides, resolution, fingerprint."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from datafree.errors import UsageError
from datafree.recipe.file import RecipeFile, load_recipe, parse_recipe
from datafree.recipe.yaml_source import parse

GOOD = """\
name: tiny
parents:
  a: {model: "torchvision:resnet18", random_weights: true}
  b: {model: "torchvision:resnet18", random_weights: true}
proxy:
  count: 8
  sources:
    - {kind: noise}
merge: {budgets: [1.0, 1.25]}
evaluate:
  - {name: one, images: {digits: {}}}
"""


def _refused(text: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    return str(caught.value)


def _with(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_recipe_and_its_defaults() -> None:
    recipe = parse_recipe(GOOD, "r.yaml").recipe
    assert recipe.merge.budgets == (1.0, 1.25)
    assert (recipe.merge.apart, recipe.merge.positions, recipe.merge.ridge) == (None, 64, 1e-2)
    assert (recipe.seed, recipe.labels, recipe.oracle, recipe.proxy.allow_leak) == (0, "shared", None, False)
    settings = recipe.merge.settings(recipe.labels, 7)
    assert (settings.heads, settings.seed, settings.matching) == ("shared", 7, "activation")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("count: 8", "coutn: 8"), "r.yaml:6:3: proxy.coutn: unknown key; did you mean 'count'?"),
        (("{kind: noise}", "{kind: noise, shar: 1}"), "r.yaml:8:21: proxy.sources.0.shar: unknown key; did you mean 'share'?"),
        (("name: tiny", "nmae: tiny"), "r.yaml:1:1: nmae: unknown key; did you mean 'name'?"),
        (("{digits: {}}", "{digits: {domian: rotated}}"), "r.yaml:11:35: evaluate.0.images.digits.domian: unknown key; did you mean 'domain'?"),
        (("count: 8", 'count: "8"'), "r.yaml:6:3: proxy.count: must be a whole number, not '8'"),
        (("count: 8", "count: 0"), "r.yaml:6:3: proxy.count: must be greater than or equal to 1, not 0"),
        (("count: 8", "count: .nan"), "r.yaml:6:3: proxy.count: must be a whole number"),
        (("[1.0, 1.25]", "1.25"), "r.yaml:9:9: merge.budgets: must be a list, not 1.25"),
        (("[1.0, 1.25]", "[1.0, yes]"), "r.yaml:9:24: merge.budgets.1: must be a number, not 'yes'"),
        (("[1.0, 1.25]", "[0.9]"), "r.yaml:9:9: merge.budgets: 0.9 is below 1; a budget is multiply-adds relative to one parent: 1 is one parent, 2 two of them side by side"),
        (("[1.0, 1.25]", "[1.0, 2.5]"), "r.yaml:9:24: merge.budgets.1: 2.5 is more than all 2 parents side by side cost: at most 2"),
        (("[1.0, 1.25]", "[.inf]"), "r.yaml:9:19: merge.budgets.0: must be a finite number, not inf"),
        (("[1.0, 1.25]", "[]"), "r.yaml:9:9: merge.budgets: the list is empty: give at least one value"),
        (("[1.0, 1.25]", "[1.0, 1]"), "r.yaml:9:9: merge.budgets: a value appears twice in [1.0, 1.0]: keep each once"),
        (("budgets: [1.0, 1.25]", "apart: [1.5]"), "r.yaml:9:9: merge.apart: 1.5 is outside [0, 1]; it is the fraction of units kept apart: 0 fuses all, 1 fuses none"),
        (("{budgets: [1.0, 1.25]}", "{budgets: [1.0], apart: [0.5]}"), "r.yaml:9:1: merge: give exactly one of `budgets` (for example [1.0, 1.25]) and `apart` ([0, 0.25]); both are given"),
        (("{budgets: [1.0, 1.25]}", "{}"), "r.yaml:9:1: merge: give exactly one of `budgets` (for example [1.0, 1.25]) and `apart` ([0, 0.25]); neither is given"),
        (("{budgets: [1.0, 1.25]}", "{budgets: [1.0], ridge: 0}"), "r.yaml:9:25: merge.ridge: must be greater than 0, not 0"),
        (("{kind: noise}", "{kind: nosie}"), "r.yaml:8:8: proxy.sources.0.kind: must be 'images'"),
        (("{kind: noise}", "{share: 1}"), "r.yaml:8:7: proxy.sources.0: the key 'kind' is required"),
        (("  b: {model: \"torchvision:resnet18\", random_weights: true}\n", ""), "r.yaml:2:1: parents: 1 parent: a merge takes 2 to 16 networks of one architecture, as `parents: {first: {model: ...}, second: {model: ...}}`"),
        (("  b: {model", "  b c: {model"), "r.yaml:2:1: parents: 'b c' is no name for a parent: use letters, digits, '.', '_' and '-', starting with a letter or digit"),
        (("  b: {model", "  both: {model"), "r.yaml:2:1: parents: 'both' is no name for a parent: as the expert of a task it means all parents; give another"),
        (("  b: {model", "  night: {modle"), "r.yaml:4:11: parents.night.modle: unknown key; did you mean 'model'?"),
        (("  b: {model", "  a: {model"), "r.yaml:4:3: the key 'a' is already set on line 3; keep one"),
        (("{name: one, ", "{name: one, expert: c, "), "r.yaml:11:17: evaluate.0.expert: 'c' is none of the parents; they are a, b"),
        (("merge: {", "labels: shred\nmerge: {"), "r.yaml:9:1: labels: must be 'shared', 'separate' or 'union', not 'shred'; did you mean 'shared'?"),
        (("name: tiny", "name: a b"), "r.yaml:1:1: name: 'a b' also names the output folder: use letters, digits, '.', '_' and '-', starting with a letter or digit"),
        (("    - {kind: noise}\n", ""), "r.yaml:7:3: proxy.sources: must be a list, not nothing"),
        (("{name: one, images: {digits: {}}}", "{name: one, images: {}}"), "r.yaml:11:17: evaluate.0.images: give exactly one of folder, npz, webdataset, torchvision, digits; none is given"),
        (("- {name: one, images: {digits: {}}}", "- {name: one, images: {digits: {}}}\n  - {name: one, images: {digits: {}}}"), "r.yaml:12:6: evaluate.1.name: 'one' is already the name of evaluate.0: rename one"),
    ],
)  # fmt: skip
def test_mistakes_are_located_and_explained(change: tuple[str, str], message: str) -> None:
    assert _refused(_with(*change)).startswith(message)


MODEL = "{model: 'torchvision:resnet18', random_weights: true}"


def test_three_parents_by_names_of_their_own() -> None:
    text = _with("  a: {", f"  day: {MODEL}\n  night.v2: {{").replace("  b: {", "  dusk_3: {")
    recipe = parse_recipe(text, "r.yaml", ["merge.budgets=[1, 3]", "evaluate.0.expert=dusk_3"]).recipe
    assert list(recipe.parents) == ["day", "night.v2", "dusk_3"], "in the order of the file"
    assert _refused(text, "merge.budgets=[1, 3.5, 2, 4]").splitlines() == [
        "--set merge.budgets=[1, 3.5, 2, 4]: merge.budgets.1: 3.5 is more than all 3 parents side by side cost: at most 3",
        "--set merge.budgets=[1, 3.5, 2, 4]: merge.budgets.3: 4 is more than all 3 parents side by side cost: at most 3",
    ]
    assert _refused(text, "evaluate.0.expert=dusk").endswith(
        "evaluate.0.expert: 'dusk' is none of the parents; did you mean 'dusk_3'?"
    )
    assert parse_recipe(text, "r.yaml", ["evaluate.0.expert=both"]).recipe.evaluate[0].expert == "both"


def test_a_merge_takes_no_more_parents_than_a_mask_has_bits() -> None:
    def of(count: int) -> str:
        return _with("  a: {", "".join(f"  p{i}: {MODEL}\n" for i in range(count - 2)) + "  a: {")

    assert len(parse_recipe(of(16), "r.yaml").recipe.parents) == 16
    assert _refused(of(17)).startswith("r.yaml:2:1: parents: 17 parents: a merge takes 2 to 16 networks")


def test_a_parent_can_be_added_on_the_command_line() -> None:
    recipe = parse_recipe(GOOD, "r.yaml", [f"parents.third={MODEL}"]).recipe
    assert list(recipe.parents) == ["a", "b", "third"]


def test_the_order_of_the_parents_is_part_of_the_meaning() -> None:
    """The first is the one that the others are matched to, and with separate labels the order is that of the heads."""
    lines = GOOD.splitlines()
    lines[2], lines[3] = lines[3], lines[2]
    turned = parse_recipe("\n".join(lines), "r.yaml").recipe
    assert list(turned.parents) == ["b", "a"]
    assert turned.fingerprint() != parse_recipe(GOOD, "r.yaml").recipe.fingerprint()


def test_every_mistake_is_listed_in_the_order_of_the_file() -> None:
    text = _with("count: 8", "coutn: 8").replace("budgets", "budgts").replace("name: tiny", "name: 3")
    lines = _refused(text).splitlines()
    assert [line.split(" ")[1] for line in lines] == ["name:", "proxy.coutn:", "merge.budgts:"]


def test_an_override_is_the_place_of_its_own_mistakes() -> None:
    assert (
        _refused(GOOD, "proxy.coutn=3")
        == "--set proxy.coutn=3: proxy.coutn: unknown key; did you mean 'count'?"
    )
    message = _refused(GOOD, "merge.budgets.1=7")
    assert message == (
        "--set merge.budgets.1=7: merge.budgets.1: 7 is more than all 2 parents side by side cost: at most 2"
    )


def test_a_recipe_goes_to_another_process_with_its_places() -> None:
    recipe = parse_recipe(GOOD, "r.yaml", ["compare=[regmean]", "seed=3"])
    again = pickle.loads(pickle.dumps(recipe))
    assert again == recipe
    assert again.recipe.fingerprint() == recipe.recipe.fingerprint()
    assert str(again.error("no", "seed")) == "--set seed=3: seed: no"


def test_overrides_change_values_and_sections() -> None:
    recipe = parse_recipe(GOOD, "r.yaml", ["merge.budgets=null", "merge.apart=[0, 0.25]", "seed=3"]).recipe
    assert (recipe.merge.budgets, recipe.merge.apart, recipe.seed) == (None, (0.0, 0.25), 3)
    with_oracle = parse_recipe(
        GOOD, "r.yaml", ["oracle.count=5", "oracle.images.digits={split: train}"]
    ).recipe
    assert with_oracle.oracle is not None
    assert with_oracle.oracle.count == 5


def test_the_fingerprint_is_the_meaning() -> None:
    base = parse_recipe(GOOD, "r.yaml").recipe.fingerprint()
    spelt_out = parse_recipe(
        GOOD + "seed: 0\nlabels: shared\n# a comment\nfolder: /elsewhere\nlicense: mit\n", "other.yaml"
    ).recipe
    assert spelt_out.fingerprint() == base
    for override in ("seed=1", "merge.ridge=0.002", "proxy.sources.0.share=1.0", "evaluate=[]"):
        changed = parse_recipe(GOOD, "r.yaml", [override]).recipe.fingerprint() != base
        assert changed == (override != "proxy.sources.0.share=1.0"), override


def test_a_resolved_recipe_runs_again_from_its_new_place(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    original = tmp_path / "recipes" / "tiny.yaml"
    original.write_text(GOOD)
    loaded = load_recipe(original, ["seed=4"])
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    (out / "recipe.resolved.yaml").write_text(loaded.resolved(out))
    again = load_recipe(out / "recipe.resolved.yaml")
    assert again.base == loaded.base == tmp_path / "recipes"
    assert again.recipe.fingerprint() == loaded.recipe.fingerprint()
    assert str(tmp_path) not in loaded.resolved(out), "an absolute path would tie it to this machine"
    assert parse(loaded.resolved(out), "resolved").data["merge"]["positions"] == 64, "defaults are spelt out"


def test_errors_raised_inside_a_section_get_its_place() -> None:
    loaded = parse_recipe(GOOD, "r.yaml")
    with pytest.raises(UsageError) as caught, loaded.at("parents", "b"):
        raise UsageError("no such file")
    assert str(caught.value) == "r.yaml:4:3: parents.b: no such file"
    with pytest.raises(UsageError) as caught, loaded.at("parents", "b"):
        raise UsageError("no such model", "model")
    assert str(caught.value) == "r.yaml:4:7: parents.b.model: no such model"
    with pytest.raises(UsageError) as caught, loaded.at("parents", "b"):
        raise UsageError("no such key", "weights_key")
    assert str(caught.value) == "r.yaml:4:3: parents.b.weights_key: no such key", "the section around it"
    with pytest.raises(ZeroDivisionError), loaded.at("parents", "b"):
        raise ZeroDivisionError


def _missing(folder: Path) -> Path:
    return folder / "tinny.yaml"


def _binary(folder: Path) -> Path:
    path = folder / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    return path


def _folder(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, "{path}: no such recipe; give the path of a .yaml file; did you mean {folder}/tiny.yaml?"),
        (_binary, "{path}:1:1: not a text file (byte 0 is not UTF-8); a recipe is YAML"),
        (_folder, "{path}: cannot be read: Is a directory"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    (tmp_path / "tiny.yaml").write_text(GOOD)
    path = make(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert str(caught.value) == message.format(path=path, folder=tmp_path)


def test_a_recipe_file_knows_its_folder(tmp_path: Path) -> None:
    loaded = parse_recipe(GOOD, tmp_path / "r.yaml")
    assert isinstance(loaded, RecipeFile)
    assert loaded.base == tmp_path
    assert parse_recipe(GOOD + "folder: ../x\n", tmp_path / "r.yaml").base == tmp_path.parent / "x"
