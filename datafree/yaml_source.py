"""Recipe text to plain data, with the place of every key remembered, so that every later error can point at
it.

Safe loading only (no tags that build objects), and the scalars of YAML 1.2's core schema: `1e-3` is a
number and `no` is a word, unlike PyYAML's default. Repeated keys are an error, unlike PyYAML's default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import yaml

from datafree.errors import UsageError

Key = tuple[str | int, ...]

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_SCALARS: tuple[tuple[str, re.Pattern[str], str | None], ...] = (
    ("tag:yaml.org,2002:null", _NULL, None),
    ("tag:yaml.org,2002:bool", _BOOL, None),
    ("tag:yaml.org,2002:int", _INT, None),  # before float, whose pattern also matches whole numbers
    ("tag:yaml.org,2002:float", _FLOAT, None),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), None),
)


_PLAIN = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something other than text."""


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


@dataclass(frozen=True)
class Source:
    """The data of one YAML text and where each of its keys stands.

    places: key path -> where it was written, as `file:line:column` (1-based) or `--set a.b=value`.
    """

    file: str
    text: str
    data: dict[str, Any]
    places: dict[Key, str]

    def place(self, key: Key) -> str:
        """Where `key` stands, or the nearest section around it that was written."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.file)

    def error(self, key: Key, message: str) -> UsageError:
        """The error `file:line:column: path.to.key: message`."""
        return UsageError(self.locate(key, message))

    def locate(self, key: Key, message: str) -> str:
        name = spell(key)
        return f"{self.place(key)}: {name}: {message}" if name else f"{self.place(key)}: {message}"


def spell(key: Key) -> str:
    """`("proxy", "sources", 0)` as `proxy.sources.0`, the way `--set` takes it."""
    return ".".join(str(part) for part in key)


def parse(text: str, file: str) -> Source:
    """Read YAML whose top level is a mapping. Raises UsageError with `file:line:column` for anything it
    cannot take.
    """
    places: dict[Key, str] = {}
    try:
        data = _load(text, places, file)
    except yaml.MarkedYAMLError as error:
        raise UsageError(_syntax_message(error, file)) from error
    except yaml.reader.ReaderError as error:
        raise UsageError(
            f"{file}: character {error.position} is not allowed in YAML ({error.reason})"
        ) from error
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {_kind(data)}"
        raise UsageError(f"{file}:1:1: a recipe is a mapping (`key: value` lines), but this text is {found}")
    return Source(file, text, data, places)


def dump(data: Any) -> str:
    """YAML that `parse` reads back to the same data, keys in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def override(source: Source, assignments: Iterable[str]) -> Source:
    """`source` with each `a.b=value` applied, as `--set` gives them; values are read as YAML, lists by
    index (`a.0.b`).

    A key that does not exist yet is created, so that optional sections can be filled; a misspelt one is
    caught by the schema afterwards. Raises UsageError for text that is not an assignment and for an index
    outside its list.
    """
    for assignment in assignments:
        source = _assign(source, assignment)
    return source


def _assign(source: Source, assignment: str) -> Source:
    place = f"--set {assignment}"
    name, equals, text = assignment.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(f"{place}: expected key.path=value, for example --set proxy.count=256")
    value_places: dict[Key, str] = {}
    try:
        value = _load(text, value_places, place)
    except yaml.YAMLError as error:
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise UsageError(f"{place}: the value is not valid YAML: {reason}") from error
    key, data = _put(source.data, parts, value, (), place)
    places = {old: where for old, where in source.places.items() if old[: len(key)] != key}
    places.update({key + inner: place for inner in (*value_places, ())})
    return replace(source, data=data, places=places)


def _put(data: Any, parts: Sequence[str], value: Any, done: Key, place: str) -> tuple[Key, Any]:
    """A copy of `data` with `value` at `parts`, and the key path with list indices as numbers."""
    head, rest = parts[0], parts[1:]
    if isinstance(data, list):
        if not data:
            name = spell(done)
            raise UsageError(
                f"{place}: {name} is an empty list: give the whole list, for example {name}=[...]"
            )
        if not re.fullmatch(r"[0-9]+", head) or int(head) >= len(data):
            raise UsageError(
                f"{place}: {spell(done)} is a list of {len(data)}: use an index from 0 to {len(data) - 1}, "
                f"not {head!r}"
            )
        part: str | int = int(head)
        inner = data[part]
    elif data is None or isinstance(data, dict):
        data = {} if data is None else data
        part, inner = head, data.get(head)
    else:
        raise UsageError(f"{place}: {spell(done)} is {data!r}, which has no key {head!r} inside")
    if rest:
        key, inner = _put(inner, rest, value, (*done, part), place)
    else:
        key, inner = (*done, part), value
    copy: Any = list(data) if isinstance(data, list) else dict(data)
    copy[part] = inner
    return key, copy


def _load(text: str, places: dict[Key, str], file: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _read(loader, node, (), places, file, ())
    finally:
        loader.dispose()


def _read(
    loader: _Loader,
    node: yaml.Node,
    key: Key,
    places: dict[Key, str],
    file: str,
    above: tuple[yaml.Node, ...],
) -> Any:
    """Plain data of `node`; `above` are the nodes around it, to catch an alias that contains itself."""
    places.setdefault(key, _at(file, node.start_mark))
    if node in above:
        raise yaml.MarkedYAMLError(None, None, "this alias contains itself", node.start_mark)
    if node.tag not in _PLAIN:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise yaml.MarkedYAMLError(
            None, None, f"only plain data is allowed here, not the tag '{tag}'", node.start_mark
        )
    inside = (*above, node)
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(loader, node)
        loader.flatten_mapping(node)  # resolves `<<: *anchor`
        mapping: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = _key_name(loader, name_node)
            places[(*key, name)] = _at(file, name_node.start_mark)
            mapping[name] = _read(loader, value_node, (*key, name), places, file, inside)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [
            _read(loader, item, (*key, index), places, file, inside) for index, item in enumerate(node.value)
        ]
    return loader.construct_object(node)


def _refuse_repeated_keys(loader: _Loader, node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for name_node, _ in node.value:
        if name_node.tag == "tag:yaml.org,2002:merge":
            continue
        name = _key_name(loader, name_node)
        if name in seen:
            raise yaml.MarkedYAMLError(
                None,
                None,
                f"the key {name!r} is already set on line {seen[name]}; keep one",
                name_node.start_mark,
            )
        seen[name] = name_node.start_mark.line + 1


def _key_name(loader: _Loader, node: yaml.Node) -> str:
    name = loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
    if not isinstance(name, str):
        raise yaml.MarkedYAMLError(None, None, "a key must be text; put it in quotes", node.start_mark)
    return name


def _syntax_message(error: yaml.MarkedYAMLError, file: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = file if mark is None else _at(file, mark)
    context = f" ({error.context})" if error.context else ""
    return f"{where}: {error.problem}{context}"


def _at(file: str, mark: yaml.Mark) -> str:
    return file if file.startswith("--set ") else f"{file}:{mark.line + 1}:{mark.column + 1}"


def _kind(data: object) -> str:
    return {list: "list", str: "text", bool: "true/false", int: "number", float: "number"}.get(
        type(data), "value"
    )
