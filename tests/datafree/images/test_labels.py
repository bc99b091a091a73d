"""Labels of image folders that hold a part of the classes: by a pattern, a file or a mapping, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from click.testing import CliRunner
from PIL import Image

from datafree.cli import main
from datafree.errors import UsageError
from datafree.evaluation.evaluate import TaskSpec, load_task
from datafree.images.image_set import ImageSet, ImageSpec, load_images
from tests.datafree.tiny import make_tiny


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)


def load(base: Path, labels: dict[str, Any], folder: str = "photos", **keys: Any) -> ImageSet:
    return load_images(ImageSpec.model_validate({"folder": folder, "labels": labels, **keys}), base)


def labels_of(images: ImageSet) -> list[int]:
    assert images.labels is not None
    return images.labels.tolist()


def refusal(base: Path, labels: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        load(base, labels)
    return str(caught.value)


FLAT = ("0003.png", "0417.png", "0999.png")


def test_the_number_in_the_name_of_a_flat_file(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", *FLAT)
    images = load(tmp_path, {"pattern": r"(\d+)\.png"})
    assert labels_of(images) == [3, 417, 999]
    assert images.classes is None
    assert labels_of(load(tmp_path, {"pattern": r"(\d+)\.png"}, keep_labels=(417,))) == [417]


def test_a_pattern_sees_the_path_inside_the_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", "class12/a.png", "class7/b.png")
    images = load(tmp_path, {"pattern": r"^class(\d+)/"})
    assert labels_of(images) == [12, 7]
    assert images.classes is not None
    assert (images.classes[7], images.classes[12], images.classes[0]) == ("class7", "class12", "0")


MAPPED = {"n03": 2, "n07": 5, "n99": 8}


@pytest.mark.parametrize("written", ["map", "labels.json", "names.json", "labels.csv", "heading.csv"])
def test_subfolders_that_are_a_part_of_the_classes(written: str, tmp_path: Path) -> None:
    pictures(tmp_path / "photos", "n03/x.png", "n07/deep/y.png", "n07/z.png")
    lines = "".join(f"{name},{output}\n" for name, output in MAPPED.items())
    (tmp_path / "labels.json").write_text(json.dumps(MAPPED))
    (tmp_path / "names.json").write_text(json.dumps(["a", "b", "n03", "c", "d", "n07"]))
    (tmp_path / "labels.csv").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "heading.csv").write_text("synset, output\n\n" + lines)
    images = load(tmp_path, {"map": MAPPED} if written == "map" else {"file": written})
    assert labels_of(images) == [2, 5, 5]
    assert images.classes == ("0", "1", "n03", "3", "4", "n07")


def test_the_most_telling_name_wins(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", "a/1.png", "a/2.png", "b/1.png", "b/3.png")
    images = load(tmp_path, {"map": {"a": 0, "b": 1, "3": 3, "1.png": 4, "a/1.png": 5}})
    assert labels_of(images) == [5, 0, 4, 3]
    assert images.classes is None


def test_a_task_counts_its_targets_from_such_labels(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", "n03/x.png", "n07/y.png")
    spec = {"name": "t", "label_offset": 2, "images": {"folder": "photos", "labels": {"map": MAPPED}}}
    task = load_task(TaskSpec.model_validate(spec), tmp_path)
    assert task.targets.tolist() == [0, 3]
    assert task.class_names() == {0: "n03", 3: "n07"}


def test_images_without_a_label_are_named(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    pictures(photos, "1.png", "a.png", "b.png")
    assert refusal(tmp_path, {"pattern": r"(\d+)\.png"}) == (
        f"2 of 3 images in {photos} have no label: pattern '(\\\\d+)\\\\.png' is not in 'a.png'; nor have b.png"
    )
    assert refusal(tmp_path, {"map": {"1": 1, "b": 0}}) == (
        f"1 of 3 images in {photos} have no label: labels.map lists none of 'a.png', 'a'"
    )
    (tmp_path / "l.csv").write_text("b,0\n")
    assert f"2 of 3 images in {photos} have no label: {tmp_path}/l.csv lists none of '1.png'" in refusal(
        tmp_path, {"file": "l.csv"}
    )
    pictures(photos, f"{'9' * 30}.png")
    (photos / "a.png").unlink()
    (photos / "b.png").unlink()
    assert f"finds '{'9' * 30}', not the number of an output, from 0 to 1,000,000" in refusal(
        tmp_path, {"pattern": r"(\d+)\.png"}
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "a 1", "l.txt: labels are read from .csv (lines `name,output`) and .json files"),
        ("l.csv", "", "l.csv lists no label"),
        ("l.csv", "a,1,2\n", "l.csv, line 1: 3 columns, where `name,output` is needed"),
        ("l.csv", "a,1\nb,x\n", "l.csv, line 2: the output is 'x', not the number of an output"),
        ("l.csv", "a,1\nb,-2\n", "l.csv, line 2: the output is '-2', not the number of an output"),
        ("l.csv", f"a,1\nb,{'9' * 5000}\n", "l.csv, line 2: the output is '99999"),
        ("l.csv", "a,1\na,2\n", "l.csv, line 2: 'a' is output 2 here and 1 before; keep one"),
        ("l.csv", 'a,1\n"' + "x" * 200_000, "l.csv, line 2: field larger than field limit"),
        ("l.json", "{", "l.json, line 1: no JSON ("),
        ("l.json", "[" * 100_000, "l.json: no JSON of labels ("),
        ("l.json", '{"a": 1, "a": 2}', "l.json: 'a' is output 2 here and 1 before; keep one"),
        ("l.json", '{"a": "1"}', "l.json: the output of 'a' is 1, not a whole number"),
        ("l.json", '{"a": true}', "l.json: the output of 'a' is True, not a whole number"),
        ("l.json", '{"a": 1e20}', "l.json: the output of 'a' is 1e+20, not a whole number"),
        ("l.json", "[1, 2]", 'l.json: {"name": output, ...} or a list of names is needed'),
        ("l.json", '["a", "a"]', "l.json: 'a' is output 1 here and 0 before; keep one"),
        ("l.csv", b"\xff\xfe", "is not UTF-8 text (byte 0)"),
    ],
)
def test_files_of_labels_that_are_wrong(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    pictures(tmp_path / "photos", "a.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(tmp_path, {"file": name})
    assert f"file of labels {tmp_path}/absent.csv does not exist" in refusal(tmp_path, {"file": "absent.csv"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"folder": ".", "labels": {}}, "give exactly one of pattern, file, map; none is given"),
        ({"folder": ".", "labels": {"pattern": "(a)", "file": "b"}}, "map; pattern and file are given"),
        (
            {"folder": ".", "labels": {"pattern": "("}},
            "pattern '(' is no regular expression (missing ), unterminated",
        ),
        (
            {"folder": ".", "labels": {"pattern": r"\d"}},
            "has 0 groups: put the output's number in exactly one pair",
        ),
        (
            {"folder": ".", "labels": {"map": {"a": -1}}},
            "map: 'a' is output -1; outputs count from 0 to 1,000,000",
        ),
        (
            {"npz": "a.npz", "labels": {"map": {"a": 1}}},
            "labels are for images of a `folder`; npz brings its own",
        ),
    ],
)
def test_sections_that_contradict_themselves(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        ImageSpec.model_validate(keys)
    assert message in str(caught.value)


def test_check_says_where_the_recipe_is_wrong(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    pictures(tmp_path / "photos", "1.png", "7.png")
    evaluate = 'evaluate:\n  - {name: photos, images: {folder: photos, labels: {pattern: "PATTERN"}}}\n'
    text = tiny.recipe.read_text().split("evaluate:")[0] + evaluate
    tiny.recipe.write_text(text.replace("PATTERN", r"([0-9])"))
    result = CliRunner().invoke(main, ["check", str(tiny.recipe)])
    assert result.exit_code == 0, result.stderr
    assert "images     photos: 2" in result.output
    tiny.recipe.write_text(text.replace("PATTERN", r"([2-9])"))
    result = CliRunner().invoke(main, ["check", str(tiny.recipe)])
    assert result.exit_code == 2
    assert (
        f"{tiny.recipe}:11:5: evaluate.0: 1 of 2 images in {tmp_path}/photos have no label" in result.stderr
    )


def test_half_of_imagenet_is_evaluated_from_a_flat_folder(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "imagenet224" / "evaluation"
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder}")
    spec = ImageSpec.model_validate({"folder": str(folder), "labels": {"pattern": r"(\d+)\.jpg"}})
    images = load_images(spec, tmp_path, verify=False)
    assert labels_of(images) == list(range(1, 1000, 2))
