"""Recipe text to plain data, with the place of every key remembered, so that every later error can point at
it.

Safe loading only (no tags that build objects), and the scalars of YAML 1.2's core schema: `1e-3` is a
number and `no` is a word, unlike PyYAML's default. Repeated keys are an error, unlike PyYAML's default.

What a few kilobytes of text may unfold to is bounded: MOST_TEXT characters, MOST_DEPTH levels of nesting,
MOST_VALUES values once aliases are followed, whole numbers of 64 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import yaml

from datafree.errors import UsageError

Key = tuple[str | int, ...]

MOST_TEXT = 500_000  # characters; PyYAML reads as many in a few seconds
MOST_DEPTH = 50
MOST_VALUES = 100_000
_LONGEST_SHOWN = 200  # of an assignment, where an error names it as its place

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


_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_PLAIN = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """PyYAML calls itself once a level: the depth is bounded before Python's stack is."""
        self.depth += 1
        if self.depth > MOST_DEPTH:
            mark = self.peek_event().start_mark
            raise _mistake(f"this is nested more than {MOST_DEPTH} levels deep: no recipe is", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


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


def parse(text: str, file: str, what: str = "recipe") -> Source:
    """Read YAML whose top level is a mapping. Raises UsageError with `file:line:column` for anything it
    cannot take.

    what: the text is, in errors
    """
    places: dict[Key, str] = {}
    if len(text) > MOST_TEXT:
        raise UsageError(
            f"{file}:1:1: the text has {len(text):,} characters; a {what} has at most {MOST_TEXT:,}"
        )
    try:
        data = _load(text, places, file)
    except yaml.MarkedYAMLError as error:
        raise UsageError(_syntax_message(error, file)) from error
    except yaml.reader.ReaderError as error:
        raise UsageError(
            f"{locate(file, text[: error.position])}: the character {text[error.position]!a} is not allowed in "
            "YAML; remove it"
        ) from error
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {_kind(data)}"
        raise UsageError(f"{file}:1:1: a {what} is a mapping (`key: value` lines), but this text is {found}")
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
    if len(place) > _LONGEST_SHOWN:
        place = place[: _LONGEST_SHOWN - 3] + "..."
    name, equals, text = assignment.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(f"{place}: expected key.path=value, for example --set proxy.count=256")
    if len(parts) > MOST_DEPTH or len(text) > MOST_TEXT:
        raise UsageError(f"{place}: at most {MOST_DEPTH} keys and {MOST_TEXT:,} characters can be given")
    value_places: dict[Key, str] = {}
    try:
        value = _load(text, value_places, place)
    except yaml.YAMLError as error:
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise UsageError(f"{place}: the value is not valid YAML: {reason}") from error
    return put(source, parts, value, dict.fromkeys((*value_places, ()), place))


def put(source: Source, parts: Sequence[str], value: Any, value_places: Mapping[Key, str]) -> Source:
    """`source` with `value` at the key path `parts`, where list indices are digits.

    value_places: where every key inside `value` was written, and at () `value` itself, which errors name
    Raises UsageError for an index outside its list.
    """
    key, data = _put(source.data, parts, value, (), value_places[()])
    places = {old: where for old, where in source.places.items() if old[: len(key)] != key}
    places.update({key + inner: place for inner, place in value_places.items()})
    for length in range(1, len(key)):  # sections that are there from now on
        places.setdefault(key[:length], value_places[()])
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
        try:
            node = loader.get_single_node()
        except (
            ValueError,
            OverflowError,
        ) as error:  # of an escape beyond Unicode, a %YAML version without end
            if isinstance(error, yaml.YAMLError):
                raise
            raise _mistake(f"this is no YAML ({_first_line(error)})", loader.get_mark()) from error
        return None if node is None else _Reader(file, places).read(node, (), ())
    finally:
        loader.dispose()


class _Reader:
    """Plain data of a composed tree, and where each key of it stands."""

    def __init__(self, file: str, places: dict[Key, str]) -> None:
        self._file = file
        self._places = places
        self._values = 0
        self._pairs: dict[int, _Pairs] = {}  # by a node's identity, so that an alias is unfolded once

    def read(self, node: yaml.Node, key: Key, above: tuple[yaml.Node, ...]) -> Any:
        """`above` are the nodes around `node`, to catch an alias that contains itself."""
        self._places.setdefault(key, _at(self._file, node.start_mark))
        _refuse_endless(node, above)
        self._values += 1
        if self._values > MOST_VALUES:
            message = f"with its aliases this text has more than {MOST_VALUES:,} values: no recipe has"
            raise _mistake(message, node.start_mark)
        inside = (*above, node)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for name, (name_node, value_node) in self._pairs_of(node, above).items():
                self._places[(*key, name)] = _at(self._file, name_node.start_mark)
                mapping[name] = self.read(value_node, (*key, name), inside)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*key, index), inside) for index, item in enumerate(node.value)]
        return _scalar(node)

    def _pairs_of(self, node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> _Pairs:
        """The keys of a mapping; those of `<<: *other` come first and give way to its own."""
        _refuse_endless(node, above)
        if id(node) in self._pairs:
            return self._pairs[id(node)]
        own: _Pairs = {}
        merged: list[yaml.Node] = []
        for name_node, value_node in node.value:
            if name_node.tag == _MERGE:
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            name = _key_name(name_node)
            if name in own:
                line = own[name][0].start_mark.line + 1
                message = f"the key {_shown(name)} is already set on line {line}; keep one"
                raise _mistake(message, name_node.start_mark)
            own[name] = (name_node, value_node)
        pairs: _Pairs = {}
        for other in reversed(merged):  # the first named wins
            if not isinstance(other, yaml.MappingNode):
                raise _mistake("`<<` takes a mapping, or a list of mappings", other.start_mark)
            pairs |= self._pairs_of(other, (*above, node))
        pairs |= own
        self._pairs[id(node)] = pairs
        return pairs


_Pairs = dict[str, tuple[yaml.Node, yaml.Node]]


def _refuse_endless(node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
    if node in above:
        raise _mistake("this alias contains itself", node.start_mark)
    if len(above) >= MOST_DEPTH:
        message = f"with its aliases this is nested more than {MOST_DEPTH} levels deep: no recipe is"
        raise _mistake(message, node.start_mark)
    if node.tag not in _PLAIN:
        tag = node.tag.replace(_TAG, "!!")
        raise _mistake(f"only plain data is allowed here, not the tag {_shown(tag)}", node.start_mark)


def _scalar(node: yaml.Node) -> Any:
    """The value of a scalar, by its tag, which somebody may have written (`!!int "7"`)."""
    text, kind = node.value, node.tag.removeprefix(_TAG)
    fits = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}
    if kind not in (*fits, "str", "merge") or (kind in fits and not fits[kind].match(text)):
        raise _mistake(f"{_shown(text)} is no !!{kind}", node.start_mark)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return _whole(text, node.start_mark)
    if kind == "float":
        return _number(text, node.start_mark)
    return _text(text, node.start_mark)


def _whole(text: str, mark: yaml.Mark) -> int:
    if len(text) <= _INT64_DIGITS and -(2**63) <= int(text) < 2**63:
        return int(text)
    raise _mistake(f"the number {_shown(text, quoted=False)} does not fit in 64 bits", mark)


_INT64_DIGITS = 20  # of the longest, its sign included


def _number(text: str, mark: yaml.Mark) -> float:
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(value) and "inf" not in text.lower():
        raise _mistake(f"the number {_shown(text, quoted=False)} is too large", mark)
    return value


def _text(text: str, mark: yaml.Mark) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _mistake(f"{text[error.start]!a} is half a character and no text", mark) from error
    return text


def _key_name(node: yaml.Node) -> str:
    name = _scalar(node) if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN else None
    if not isinstance(name, str):
        raise _mistake("a key must be text; put it in quotes", node.start_mark)
    return name


def _mistake(message: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, message, mark)


def _shown(text: str, *, quoted: bool = True) -> str:
    short = text if len(text) <= 40 else text[:37] + "..."
    return repr(short) if quoted else short


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def locate(file: str, before: str) -> str:
    """`file:line:column` (1-based) of the character that follows `before`."""
    line = before.count("\n") + 1
    return f"{file}:{line}:{len(before) - before.rfind(chr(10))}"


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
