"""Draws scenes: the truth that `shapes` is trained on and that its judge is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgegen.students.shapes.grammar import PLACES, RELATIONS, Scene

SIDE = 64
PALETTE = {
    "red": (214, 40, 40),
    "green": (38, 158, 72),
    "blue": (40, 84, 214),
    "yellow": (242, 214, 40),
    "purple": (138, 52, 172),
    "orange": (245, 132, 26),
}
BACKGROUND = (236, 236, 232)
RADIUS = {"small": (5.5, 7.0), "large": (10.5, 13.0)}
SQUARE_HALF = 0.92
"""Half a square's side over its radius: a square of radius 1 then covers about as much as a circle of radius 1."""
CELLS = (16.0, 32.0, 48.0)

FloatArray = NDArray[np.floating[Any]]


def signed_distance(shape: str, x: FloatArray, y: FloatArray, radius: float) -> FloatArray:
    """Signed distance in pixels to the outline, negative inside; (x, y) are relative to the centre."""
    if shape == "circle":
        circle: FloatArray = np.hypot(x, y) - radius
        return circle
    if shape == "square":
        square: FloatArray = np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF * radius
        return square
    # An upright equilateral triangle in a box 2 radius wide: slanted sides at 60 degrees, flat base.
    height = np.sqrt(3.0) * radius
    slanted = (np.abs(x) * np.sqrt(3.0) - (y + height / 2)) / 2
    triangle: FloatArray = np.maximum(slanted, y - height / 2)
    return triangle


def render(scene: Scene, rng: np.random.Generator) -> FloatArray:
    """Draw `scene` with jittered position, size and shade -> [3, 64, 64] fp32 in -1..1, antialiased."""
    ys, xs = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
    picture = np.array(BACKGROUND, dtype=np.float32)[:, None, None] + rng.uniform(-4, 4)
    picture = np.broadcast_to(picture, (3, SIDE, SIDE)).copy()
    for thing, (cx, cy) in zip(scene.things, _centres(scene, rng), strict=True):
        radius = rng.uniform(*RADIUS[thing.size])
        distance = signed_distance(thing.shape, xs - np.float32(cx), ys - np.float32(cy), radius)
        cover = np.clip(0.5 - distance, 0.0, 1.0)[None]
        colour = np.array(PALETTE[thing.colour], dtype=np.float32)[:, None, None] + rng.uniform(-8, 8)
        picture = picture * (1 - cover) + colour * cover
    drawn: FloatArray = (np.clip(picture, 0, 255) / 127.5 - 1).astype(np.float32)
    return drawn


def _centres(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    if scene.relation is None:
        assert scene.place is not None
        column, row = PLACES[scene.place]
        dx, dy = rng.uniform(-2.5, 2.5, 2)
        return [(CELLS[column] + dx, CELLS[row] + dy)]
    axis = RELATIONS[scene.relation]
    centres = []
    for along in (CELLS[0], CELLS[2]):
        along += rng.uniform(-2.0, 2.0)
        across = CELLS[1] + rng.uniform(-5.0, 5.0)
        centres.append((along, across) if axis == 0 else (across, along))
    return centres


def render_batch(scenes: Sequence[Scene], rng: np.random.Generator) -> FloatArray:
    """Draw each scene once -> [N, 3, 64, 64] fp32 in -1..1."""
    return np.stack([render(scene, rng) for scene in scenes])
