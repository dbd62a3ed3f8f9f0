"""What a `shapes` prompt can say: one or two objects, each with size, colour and shape, and where they are.

    "a small red circle in the top left"
    "a large blue square above a small green triangle"

A `Scene` is what a prompt means. Which scenes are held back from training is decided here, by a fixed permutation, so
that training and evaluation cannot disagree.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import cache

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
PLACES = {
    "in the center": (1, 1),
    "at the top": (1, 0),
    "at the bottom": (1, 2),
    "on the left": (0, 1),
    "on the right": (2, 1),
    "in the top left": (0, 0),
    "in the top right": (2, 0),
    "in the bottom left": (0, 2),
    "in the bottom right": (2, 2),
}
"""Phrase -> (column, row) on a grid of three by three."""

RELATIONS = {"left of": 0, "above": 1}
"""Phrase -> axis (0 is x, 1 is y) along which the first thing stands before the second."""

HELD_BACK_ONE = 108
HELD_BACK_TWO = 324


@dataclass(frozen=True, order=True)
class Thing:
    size: str
    colour: str
    shape: str

    def phrase(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, order=True)
class Scene:
    """One thing at a `place`, or two things where the first stands in `relation` to the second."""

    things: tuple[Thing, ...]
    place: str | None = None
    relation: str | None = None

    def prompt(self) -> str:
        if self.relation is None:
            return f"{self.things[0].phrase()} {self.place}"
        return f"{self.things[0].phrase()} {self.relation} {self.things[1].phrase()}"


def things() -> list[Thing]:
    return [Thing(*parts) for parts in itertools.product(SIZES, COLOURS, SHAPES)]


@cache
def one_object_scenes() -> tuple[Scene, ...]:
    return tuple(Scene((thing,), place=place) for thing in things() for place in PLACES)


@cache
def two_object_scenes() -> tuple[Scene, ...]:
    pairs = itertools.product(things(), repeat=2)
    return tuple(Scene(pair, relation=relation) for pair in pairs for relation in RELATIONS if pair[0] != pair[1])


@cache
def held_back() -> tuple[Scene, ...]:
    """The evaluation list: scenes that training never draws."""
    rng = random.Random(20260101)
    one = rng.sample(one_object_scenes(), HELD_BACK_ONE)
    two = rng.sample(two_object_scenes(), HELD_BACK_TWO)
    return tuple(one + two)


@cache
def training_scenes() -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """(one-object, two-object) scenes that training may draw."""
    hidden = set(held_back())
    one = tuple(scene for scene in one_object_scenes() if scene not in hidden)
    return one, tuple(scene for scene in two_object_scenes() if scene not in hidden)


def vocabulary() -> list[str]:
    """Every word a prompt can hold, in a fixed order."""
    words: dict[str, None] = {"a": None, "an": None}
    for phrase in itertools.chain(SIZES, COLOURS, SHAPES, PLACES, RELATIONS):
        words.update(dict.fromkeys(phrase.split()))
    return list(words)
