"""The labels of image files whose folders do not say them: by a pattern in their names, a file, or a mapping.

A folder with one subfolder per class numbers its classes in the order of their names, which is right only where all
classes of the network are there. Part of the classes, or images that all lie flat, need `labels`:

    labels: {pattern: '(\\d+)\\.jpg'}           # 0417.jpg shows class 417: a regular expression with one group
    labels: {file: classes.csv}               # lines `name,output`, or JSON: {"name": output}, ["of output 0", ...]
    labels: {map: {n01440764: 0, n02123045: 281}}

A name is an image's path inside the folder, its file name with or without the ending, or the subfolder it lies in,
whichever is found first in this order. Names that no image has are no mistake; an image without a label is.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from datafree.errors import UsageError
from datafree.images.files import MOST_LABEL
from datafree.spec import Spec, resolve_path

MOST_BYTES = 100 * 10**6  # of a file of labels: ImageNet's whole training set has half of that
_NAMED = 5


class LabelsSpec(Spec):
    """How images get their labels; exactly one key.

    pattern: a regular expression, looked for in the path inside the folder (`sub/0417.jpg`); its group is the output
    file:    .csv with `name,output` lines (a first line of other words is a heading), or .json with
             {"name": output, ...} or a list of names in the order of the outputs
    map:     name -> output, in the recipe itself
    """

    pattern: str | None = None
    file: str | None = None
    map: dict[str, int] | None = None

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> LabelsSpec:
        given = [key for key in ("pattern", "file", "map") if getattr(self, key) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"give exactly one of pattern, file, map; {found}")
        if self.pattern is not None:
            _compiled(self.pattern)
        for name, output in (self.map or {}).items():
            if not 0 <= output <= MOST_LABEL:
                raise ValueError(f"map: {name!r} is output {output}; outputs count from 0 to {MOST_LABEL:,}")
        return self


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression ({error})") from error
    if compiled.groups != 1:
        raise ValueError(
            f"pattern {pattern!r} has {compiled.groups} groups: put the output's number in exactly one pair of "
            r"parentheses, for example '(\d+)\.jpg'"
        )
    return compiled


def find_labels(spec: LabelsSpec, base: Path, folder: Path, paths: Sequence[Path]) -> np.ndarray:
    """int64 (N,): the output that is right for each of the images `paths` in `folder`.

    base: the folder where a relative `file` starts. Raises UsageError, naming images and why, where one has no label;
    naming file and line, where the file of labels is wrong.
    """
    inside = [path.relative_to(folder) for path in paths]
    if spec.pattern is not None:
        return _by_pattern(_compiled(spec.pattern), folder, inside)
    if spec.file is not None:
        place = resolve_path(spec.file, base)
        outputs, said = read_labels(place), str(place)
    else:
        outputs, said = spec.map or {}, "labels.map"
    found = [_look_up(outputs, path) for path in inside]
    missing = [path for path, label in zip(inside, found, strict=True) if label is None]
    if missing:
        example = ", ".join(repr(name) for name in _names(missing[0]))
        raise UsageError(
            f"{len(missing)} of {len(inside)} images in {folder} have no label: {said} lists none of {example}"
            f"{_others(missing)}"
        )
    return np.array(found, dtype=np.int64)


def name_classes(labels: np.ndarray, folder: Path, paths: Sequence[Path]) -> tuple[str, ...] | None:
    """Names by output where every label is the images of one subfolder, None elsewhere; others are numbers."""
    names: dict[int, str] = {}
    for label, path in zip(labels.tolist(), paths, strict=True):
        parts = path.relative_to(folder).parts
        if len(parts) < 2 or names.setdefault(label, parts[0]) != parts[0]:
            return None
    if len(set(names.values())) < len(names):
        return None
    return tuple(names.get(output, str(output)) for output in range(max(names) + 1))


def _by_pattern(pattern: re.Pattern[str], folder: Path, inside: Sequence[Path]) -> np.ndarray:
    labels, missing = [], []
    for path in inside:
        match = pattern.search(path.as_posix())
        text = match[1] if match is not None else None
        if text is None:
            missing.append(path)
            continue
        labels.append(_output(text, f"{folder / path}: pattern {pattern.pattern!r} finds {text[:40]!r}"))
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(inside)} images in {folder} have no label: pattern {pattern.pattern!r} is not in "
            f"{missing[0].as_posix()!r}{_others(missing)}"
        )
    return np.array(labels, dtype=np.int64)


def _others(missing: Sequence[Path]) -> str:
    named = ", ".join(path.as_posix() for path in missing[1:_NAMED])
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return f"; nor have {named}{more}" if named else ""


def _names(path: Path) -> list[str]:
    """What an image may be called in a list of labels, the most telling first."""
    folders = [parent.as_posix() for parent in path.parents if parent != Path()]
    return list(dict.fromkeys([path.as_posix(), path.name, path.stem, *folders]))


def _look_up(outputs: Mapping[str, int], path: Path) -> int | None:
    return next((outputs[name] for name in _names(path) if name in outputs), None)


def read_labels(path: Path) -> dict[str, int]:
    """Name -> output, from a .csv or .json file. Raises UsageError, with the line where there is one."""
    if path.suffix.lower() not in (".csv", ".json"):
        raise UsageError(f"{path}: labels are read from .csv (lines `name,output`) and .json files")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"file of labels {path} does not exist") from error
    except OSError as error:
        raise UsageError(f"file of labels {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"file of labels {path} is not UTF-8 text (byte {error.start})") from error
    if len(content) > MOST_BYTES:
        raise UsageError(f"file of labels {path} has more than {MOST_BYTES:,} bytes: list only what is there")
    outputs = _from_json(text, path) if path.suffix.lower() == ".json" else _from_csv(text, path)
    if not outputs:
        raise UsageError(f"{path} lists no label")
    return outputs


def _from_csv(text: str, path: Path) -> dict[str, int]:
    outputs: dict[str, int] = {}
    rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        for number, row in enumerate(rows):
            if not any(row):
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != 2:
                raise UsageError(f"{where}: {len(row)} columns, where `name,output` is needed")
            name, output = (cell.strip() for cell in row)
            if number == 0 and not output.isdecimal():
                continue  # a heading
            _add(outputs, name, _output(output, f"{where}: the output is {output[:40]!r}"), where)
    except csv.Error as error:
        raise UsageError(f"{path}, line {rows.line_num}: {error}") from error
    return outputs


def _from_json(text: str, path: Path) -> dict[str, int]:
    try:
        content: Any = json.loads(text, object_pairs_hook=list)  # pairs, so that a name given twice is seen
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}: no JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{path}: no JSON of labels ({error})") from error
    outputs: dict[str, int] = {}
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        for output, name in enumerate(content):
            _add(outputs, name, output, str(path))
        return outputs
    if not text.lstrip().startswith("{"):
        raise UsageError(f'{path}: {{"name": output, ...}} or a list of names is needed')
    for name, output in content:
        if type(output) is not int:
            raise UsageError(f"{path}: the output of {name[:60]!r} is {str(output)[:40]}, not a whole number")
        _add(
            outputs, name, _output(str(output), f"{path}: the output of {name[:60]!r} is {output}"), str(path)
        )
    return outputs


def _add(outputs: dict[str, int], name: str, output: int, where: str) -> None:
    if outputs.setdefault(name, output) != output:
        raise UsageError(
            f"{where}: {name[:60]!r} is output {output} here and {outputs[name]} before; keep one"
        )


def _output(text: str, said: str) -> int:
    if text.isdecimal() and len(text.lstrip("0")) <= len(str(MOST_LABEL)) and int(text) <= MOST_LABEL:
        return int(text)
    raise UsageError(f"{said}, not the number of an output, from 0 to {MOST_LABEL:,}")
