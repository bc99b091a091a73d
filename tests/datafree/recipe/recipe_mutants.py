"""Recipes as nobody should write them: seeded changes to the shipped ones, in their data and in their text."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

from datafree.recipe.yaml_source import parse

Place = tuple[Any, Any]  # a mapping or list, and a key or index in it

NUMBERS = [
    "-1", "0", "1e20", "-1e400", "1e400", "1e-400", "1e6", "100000000", "9" * 25, "9" * 4000, "-" + "9" * 5000, ".inf",
    "-.inf", ".nan", "0.0000001", "9223372036854775807", "9223372036854775808", "1.5", "0x10", "1_000", "1:30", "007",
]  # fmt: skip
SCALARS = [
    "null", "~", "true", "no", "''", "text", "[]", "{}", "[[]]", "{a: 1}", "[null]", "!!int x", "!!float {}",
    "!!python/name:os.system ''", "!!binary aGVsbG8=", "!!set {a}", "!!null 7", "!!bool maybe", "!!seq 3", "!!str [1]",
    "*nowhere", "&a [*a]", "<<", "=", "? x", "2020-01-01", '"\\ud800"', '"\\uDFFF\\x00"', '"\\UFFFFFFFF"', '"\\u0000"',
    "'" + "long " * 5000 + "'", "|\n  block\n", "@", "`", "%", "\u202e", "\ufeff", "é\u0301", "\U0001f600", "a\tb",
]  # fmt: skip
TEXTS = [
    "\t",
    "\x00",
    "\x07",
    "\ufffe",
    "\x85",
    "\u2028",
    ": ",
    "- ",
    "[",
    "}",
    "#",
    "&a ",
    "*a ",
    "%YAML 9.9\n",
    "---\n",
]


def mutant(text: str, number: int) -> bytes:
    """The recipe `text` with one to three changes, which `number` decides."""
    chance = random.Random(number)
    if chance.random() < 0.5:
        data = copy.deepcopy(_parsed(text))
        raw: dict[str, str] = {}
        for _ in range(chance.randint(1, 3)):
            chance.choice(_CHANGES)(data, raw, chance)
        return _written(data, raw).encode("utf-8", "surrogatepass")
    return chance.choice(_SPOILED)(text, chance)


@cache
def _parsed(text: str) -> dict[str, Any]:
    return parse(text, "shipped.yaml").data


# In the data -------------------------------------------------------------------------------------------------


def _places(data: Any) -> list[Place]:
    """Every key and index there is."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else []
    return [(data, key) for key in keys] + [place for key in keys for place in _places(data[key])]


def _delete(data: Any, raw: dict[str, str], chance: random.Random) -> None:
    inside, key = chance.choice(_places(data))
    if len(inside) > 1:
        del inside[key]


def _replace(data: Any, raw: dict[str, str], chance: random.Random) -> None:
    inside, key = chance.choice(_places(data))
    name = f"@{len(raw)}@"
    raw[name] = chance.choice([*NUMBERS, *SCALARS])
    inside[key] = name


def _copy(data: Any, raw: dict[str, str], chance: random.Random) -> None:
    places = _places(data)
    (inside, key), (other, name) = chance.choice(places), chance.choice(places)
    inside[key] = copy.deepcopy(other[name])


def _rename(data: Any, raw: dict[str, str], chance: random.Random) -> None:
    inside, key = chance.choice([place for place in _places(data) if isinstance(place[0], dict)])
    name = chance.choice(
        [key[1:] or "x", key + "s", key.upper(), "", " ", "kind", "a.b", "0", "x" * 300, "\u202e"]
    )
    inside[name] = inside.pop(key)


def _nest(data: Any, raw: dict[str, str], chance: random.Random) -> None:
    inside, key = chance.choice(_places(data))
    depth = chance.choice([1, 2, 40, 900])
    opened, closed = chance.choice([("[", "]"), ("{a: ", "}")])
    name = f"@{len(raw)}@"
    raw[name] = opened * depth + "1" + closed * depth
    inside[key] = name


def _repeat(data: Any, raw: dict[str, str], chance: random.Random) -> None:
    inside, key = chance.choice(_places(data))
    inside[key] = [copy.deepcopy(inside[key])] * chance.choice([2, 50, 500])


_CHANGES: list[Callable[[Any, dict[str, str], random.Random], None]] = [
    *(_delete, _replace, _replace, _copy, _rename, _nest, _repeat),
]


def _written(data: Any, raw: dict[str, str]) -> str:
    """As YAML; JSON is YAML, and `raw` holds the pieces that are not."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    text = "\n".join(lines) + "\n"
    for name, piece in raw.items():
        text = text.replace(json.dumps(name), piece)
    return text


# In the text -------------------------------------------------------------------------------------------------


def _cut(text: str, chance: random.Random) -> bytes:
    return text.encode()[: chance.randrange(len(text.encode()))]


def _insert(text: str, chance: random.Random) -> bytes:
    where = chance.randrange(len(text))
    return (text[:where] + chance.choice([*TEXTS, *SCALARS, *NUMBERS]) + text[where:]).encode(
        "utf-8", "surrogatepass"
    )


def _flip(text: str, chance: random.Random) -> bytes:
    content = bytearray(text.encode())
    for _ in range(chance.randint(1, 5)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def _move_a_line(text: str, chance: random.Random) -> bytes:
    lines = text.splitlines()
    line = lines.pop(chance.randrange(len(lines)))
    copies = chance.choice([0, 1, 2])
    where = chance.randrange(len(lines))
    lines[where:where] = [" " * chance.choice([0, 0, 1, 2]) + line] * copies
    return "\n".join(lines).encode()


def _indent(text: str, chance: random.Random) -> bytes:
    lines = text.splitlines()
    where = chance.randrange(len(lines))
    lines[where] = chance.choice([" ", "\t", "   ", "- "]) + lines[where]
    return chance.choice(["\n", "\r\n", "\r"]).join(lines).encode()


def _laugh(text: str, chance: random.Random) -> bytes:
    """Aliases, or merged mappings, that multiply."""
    levels = chance.choice([3, 9, 30])
    if chance.random() < 0.5:
        laughs = [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, levels)]
        return "\n".join(["x0: &x0 [lol, lol]", *laughs, text]).encode()
    laughs = [f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 9)}], k{n}: 1}}" for n in range(1, levels)]
    return "\n".join(["x0: &x0 {a: 1, b: 2}", *laughs, text]).encode()


def _encode(text: str, chance: random.Random) -> bytes:
    return text.encode(
        chance.choice(["utf-16", "utf-32", "utf-8-sig", "cp1252", "utf-16-be"]), errors="replace"
    )


_SPOILED: list[Callable[[str, random.Random], bytes]] = [
    *(_cut, _insert, _insert, _flip, _move_a_line, _indent, _laugh, _encode),
]
