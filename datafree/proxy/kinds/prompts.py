"""What a text-to-image model is asked for: the parents' classes in many settings, or neutral subjects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

_Item = TypeVar("_Item")

# "{}" is one subject. Variety of view, light and medium is what spreads a network's features out.
TEMPLATES = (
    "a photo of a {}",
    "a close-up photo of a {}",
    "a photo of a {} from far away",
    "a bright photo of a {}",
    "a dark photo of a {}",
    "a blurry photo of a {}",
    "a black and white photo of a {}",
    "a photo of a {} seen from above",
    "a photo of a {} on a table",
    "a photo of a {} outdoors",
    "a photo of a {} in the rain",
    "a photo of a small {}",
    "a photo of many {}",
    "a cropped photo of a {}",
    "a painting of a {}",
    "a pencil sketch of a {}",
    "a cartoon of a {}",
    "a plastic toy {}",
)
PAIRED = ("a photo of a {} next to a {}", "a {} in front of a {}", "a picture with a {} and a {}")

_SCENES = (
    "mountain lake, pine forest, sandy beach, desert dune, waterfall, rocky coast, meadow with flowers, "
    "snowy field, city street, stone bridge, old castle, lighthouse, wooden barn, skyscraper, "
    "greenhouse, railway station, harbour, market stall, library shelf, kitchen table, workshop bench, "
    "staircase, tiled floor, brick wall, marble statue, windmill, fountain, fence, gate, tent, igloo, "
    "iceberg, volcano, canyon, cave, thunderstorm, sunset, full moon"
)
_LIVING = (
    "dog, cat, horse, cow, sheep, elephant, bear, zebra, deer, fox, rabbit, squirrel, owl, parrot, "
    "duck, eagle, penguin, flamingo, frog, lizard, snake, turtle, goldfish, shark, jellyfish, crab, "
    "butterfly, bee, beetle, spider, snail, cactus, palm tree, oak leaf, fern, sunflower, rose, moss, "
    "coral reef"
)
_THINGS = (
    "bicycle, sailing boat, steam train, airplane, bus, truck, motorcycle, tractor, hot-air balloon, "
    "canoe, apple, banana, orange, strawberry, lemon, pineapple, broccoli, mushroom, pumpkin, loaf of "
    "bread, cheese, pizza, cup of coffee, teapot, wine glass, bottle, bowl, knife, spoon, frying pan, "
    "chair, sofa, lamp, clock, mirror, piano, guitar, violin, drum, trumpet, camera, radio, keyboard, "
    "telephone, suitcase, umbrella, backpack, hat, shoe, glove, quilt, basket, rope, hammer, saw, "
    "screw, gear, candle, lantern, kite, football, tennis racket, chess board, dice, book, map, "
    "envelope, pencil"
)
_SURFACES = (
    "woven fabric, knitted wool, leather, wood grain, cracked mud, peeling paint, rusty metal, bubbles, "
    "feathers"
)
SUBJECTS = tuple(", ".join((_SCENES, _LIVING, _THINGS, _SURFACES)).split(", "))


def compose(classes: Sequence[Sequence[str]], generator: torch.Generator) -> str:
    """One prompt. classes: the names each parent knows, possibly none.

    With names from two parents, seven prompts in ten put a subject of each in one picture (mixed-class
    prompts spread features wider); the others, and all where one parent alone has names, take one subject.
    """
    known = [names for names in classes if names]
    if len(known) >= 2 and _draw(10, generator) < 7:
        first, second = _pick(known[0], generator), _pick(known[1], generator)
        if first != second:
            return _pick(PAIRED, generator).format(first, second)
    subjects = _pick(known, generator) if known else SUBJECTS
    return _pick(TEMPLATES, generator).format(_pick(subjects, generator))


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, below, (), generator=generator))


def _pick(items: Sequence[_Item], generator: torch.Generator) -> _Item:
    return items[_draw(len(items), generator)]
