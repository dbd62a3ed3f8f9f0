"""What a `shapes` prompt can say: one or two objects, each with size, colour and shape, and where they are.

    "a small red circle in the top left"
    "a large blue square above a small green triangle"

A `Scene` is what a prompt means. Which scenes are held back from training is decided here, by a fixed permutation, so
that training and evaluation cannot disagree. "A right of B" and "B left of A" are one scene: holding it back holds back
both phrasings.
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

RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
"""Phrase -> (axis, sign): the first object stands before the second along axis 0 (x) or 1 (y), or after it."""

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

    def inverse(self) -> Scene:
        """The same picture said from the second thing's side."""
        assert self.relation is not None
        axis, sign = RELATIONS[self.relation]
        relation = next(name for name, value in RELATIONS.items() if value == (axis, -sign))
        return Scene((self.things[1], self.things[0]), relation=relation)

    def canonical(self) -> Scene:
        if self.relation is None or RELATIONS[self.relation][1] == 1:
            return self
        return self.inverse()


def things() -> list[Thing]:
    return [Thing(*parts) for parts in itertools.product(SIZES, COLOURS, SHAPES)]


@cache
def one_object_scenes() -> tuple[Scene, ...]:
    return tuple(Scene((thing,), place=place) for thing in things() for place in PLACES)


@cache
def two_object_scenes() -> tuple[Scene, ...]:
    """Canonical scenes only: the first thing is the left or the upper one."""
    pairs = itertools.product(things(), repeat=2)
    return tuple(
        Scene(pair, relation=relation) for pair in pairs for relation in ("left of", "above") if pair[0] != pair[1]
    )


@cache
def held_back() -> tuple[Scene, ...]:
    """The evaluation list: scenes that training never draws, half of the two-object ones said from the other side."""
    rng = random.Random(20260101)
    one = rng.sample(one_object_scenes(), HELD_BACK_ONE)
    two = rng.sample(two_object_scenes(), HELD_BACK_TWO)
    return tuple(one + [scene if i % 2 == 0 else scene.inverse() for i, scene in enumerate(two)])


@cache
def training_scenes() -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """(one-object, two-object) scenes that training may draw; both phrasings of a two-object scene are listed."""
    hidden = {scene.canonical() for scene in held_back()}
    one = tuple(scene for scene in one_object_scenes() if scene not in hidden)
    two = [scene for scene in two_object_scenes() if scene not in hidden]
    return one, tuple(two + [scene.inverse() for scene in two])


def vocabulary() -> list[str]:
    """Every word a prompt can hold, in a fixed order."""
    words: dict[str, None] = {"a": None, "an": None}
    for phrase in itertools.chain(SIZES, COLOURS, SHAPES, PLACES, RELATIONS):
        words.update(dict.fromkeys(phrase.split()))
    return list(words)
