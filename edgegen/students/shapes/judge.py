"""Looks at a picture and says what is on it; **alignment** is the share of prompts whose picture shows what was asked.

The judge is strict on purpose: a stray blob, a smeared outline or a colour between two names makes a picture wrong. It
reads pixels alone and knows nothing of the network that drew them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from edgegen.students.shapes.grammar import PLACES, RELATIONS, SHAPES, Scene, Thing
from edgegen.students.shapes.render import BACKGROUND, PALETTE, SQUARE_HALF, signed_distance

FloatArray = NDArray[np.floating[Any]]

FOREGROUND = 70.0
"""RGB distance (0..441) to the background from which a pixel belongs to an object."""
SPECK = 10
"""Components of fewer pixels than this are noise; larger ones count as objects."""
COLOUR_TOLERANCE = 62.0
SIZE_SPLIT = 8.75
"""Radius in pixels, as the renderer defines it, between small and large."""
OUTLINE_IOU = 0.84


@dataclass(frozen=True)
class Seen:
    """An object on a picture: `thing`, the middle of its box in pixels, and `iou` of its coverage with the ideal
    shape's."""

    thing: Thing
    x: float
    y: float
    iou: float


def _radius(shape: str, area: float) -> float:
    """The renderer's radius of a shape that covers `area` pixels."""
    unit = {"circle": np.pi, "square": 4 * SQUARE_HALF**2, "triangle": np.sqrt(3.0)}[shape]
    return float(np.sqrt(area / unit))


def _sag(shape: str, radius: float) -> float:
    """How far below the middle of its box a shape's centroid lies, in pixels."""
    return radius / (2 * float(np.sqrt(3.0))) if shape == "triangle" else 0.0


def _ideal(shape: str, radius: float, xs: FloatArray, ys: FloatArray) -> FloatArray:
    """Coverage 0..1 of the shape with its centroid at the origin of (xs, ys)."""
    cover: FloatArray = np.clip(0.5 - signed_distance(shape, xs, ys + _sag(shape, radius), radius), 0.0, 1.0)
    return cover


def look(picture: FloatArray) -> list[Seen | None]:
    """Objects on `picture` [3, H, W] in -1..1; None stands for something that is no named object.

    Each blob is explained by the nearest named colour and by the shape, of the blob's own area and centroid, whose
    coverage agrees best with it (soft intersection over union).
    """
    rgb = (np.clip(np.nan_to_num(picture, nan=-1.0), -1, 1) + 1) * 127.5
    background = np.array(BACKGROUND, dtype=rgb.dtype)[:, None, None]
    away = np.linalg.norm(rgb - background, axis=0)
    labels, _ = ndimage.label(away > FOREGROUND)
    ys, xs = np.mgrid[0 : rgb.shape[1], 0 : rgb.shape[2]] + 0.5
    seen: list[Seen | None] = []
    for index in range(1, labels.max() + 1):
        mask = labels == index
        if mask.sum() < SPECK:
            continue
        inside = ndimage.binary_erosion(mask, iterations=2)
        median = np.median(rgb[:, inside if inside.any() else mask], axis=1)
        distance = {name: float(np.linalg.norm(median - np.array(named))) for name, named in PALETTE.items()}
        colour = min(distance, key=lambda name: distance[name])
        direction = (median[:, None, None] - background) / np.sum((median[:, None, None] - background) ** 2)
        near = ndimage.binary_dilation(mask, iterations=2)
        cover = np.clip(np.sum((rgb - background) * direction, axis=0), 0.0, 1.0) * near
        area = float(cover.sum())
        x, y = float((cover * xs).sum() / area), float((cover * ys).sum() / area)
        ious = {}
        for shape in SHAPES:
            ideal = _ideal(shape, _radius(shape, area), xs - x, ys - y)
            ious[shape] = float(np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum())
        shape = max(ious, key=lambda name: ious[name])
        if ious[shape] < OUTLINE_IOU or distance[colour] > COLOUR_TOLERANCE:
            seen.append(None)
            continue
        size = "small" if _radius(shape, area) < SIZE_SPLIT else "large"
        seen.append(Seen(Thing(size, colour, shape), x, y - _sag(shape, _radius(shape, area)), ious[shape]))
    return seen


def shows(picture: FloatArray, scene: Scene) -> bool:
    """Whether `picture` [3, 64, 64] shows the right count, colours, shapes, sizes and places, and nothing else."""
    found = look(picture)
    if len(found) != len(scene.things) or any(item is None for item in found):
        return False
    objects = [item for item in found if item is not None]
    if scene.relation is None:
        assert scene.place is not None
        (only,) = objects
        cell = (min(int(only.x // (64 / 3)), 2), min(int(only.y // (64 / 3)), 2))
        return only.thing == scene.things[0] and cell == PLACES[scene.place]
    axis = RELATIONS[scene.relation]
    objects.sort(key=lambda item: (item.x, item.y)[axis])
    gap = (objects[1].x - objects[0].x, objects[1].y - objects[0].y)[axis]
    return gap >= 16 and tuple(item.thing for item in objects) == scene.things


def alignment(pictures: Sequence[FloatArray], scenes: Sequence[Scene]) -> float:
    """Share of `pictures` that show their scene, 0..1."""
    return float(np.mean([shows(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]))
