"""Whether this machine has the memory to convert what a build asks for, said before anything takes long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgegen.errors import EdgegenError

HELD = {"coreai": 6.0, "coreml": 1.7, "executorch": 1.5, "onnx": 0.6, "tflite": 4.0}
"""Backend -> how many times the fp32 weights its converter holds beside the mapped ones, as measured on full-size
components (docs/benchmarks/scale-*.md). Mapped pages are not counted: the system takes them back when it must."""
BASE_BYTES = 1 << 30
"""What a converter's own libraries take."""


@dataclass(frozen=True)
class Conversion:
    """One component for one backend: `weight_bytes` in fp32, cut into `parts` files, one after another."""

    backend: str
    component: str
    weight_bytes: int
    parts: int = 1

    @property
    def needed(self) -> int:
        """Bytes of memory that nothing else can use meanwhile."""
        return BASE_BYTES + int(HELD[self.backend] * self.weight_bytes / self.parts)


def require_room(conversions: Mapping[str, tuple[Conversion, ...]], free: int | None) -> None:
    """EdgegenError that names the largest conversion (by backend) which `free` bytes have no room for, with both
    figures; None: nobody knows how much there is."""
    if free is None:
        return
    too_large = [one for parts in conversions.values() for one in parts if one.needed > free]
    if not too_large:
        return
    worst = max(too_large, key=lambda one: one.needed)
    fitting = [name for name, parts in conversions.items() if all(one.needed <= free for one in parts)]
    more = f"on a machine with {_gib(worst.needed, up=True)} GiB free"
    raise EdgegenError(
        f"component `{worst.component}` has {_gib(worst.weight_bytes)} GiB of weights in float32, and converting it "
        f"with {worst.backend} takes about {_gib(worst.needed)} GiB of memory: {_gib(free)} GiB are free",
        hint=f"build with `--backend {','.join(fitting)}`, which fits, or {more}" if fitting else f"build {more}",
    )


def _gib(count: int, *, up: bool = False) -> str:
    size = count / (1 << 30)
    return str(math.ceil(size)) if up else f"{size:.1f}"
