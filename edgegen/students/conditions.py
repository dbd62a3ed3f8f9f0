"""Scalars that a denoiser takes beside latent, time and conditioning, such as how much a video moves. Imports no
torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgegen.errors import UsageError


def chosen_conditions(known: Mapping[str, float], asked: Mapping[str, float] | None, student: str) -> dict[str, float]:
    """`known` with the values that were asked for; UsageError for what the student does not take, or no number."""
    for name, value in (asked or {}).items():
        if name not in known:
            have = ", ".join(f"`{one}`" for one in known)
            raise UsageError(
                f"student `{student}` has no condition `{name}`",
                hint=f"it has {have}" if have else "it takes none; leave `--condition` out",
            )
        if not math.isfinite(value):
            raise UsageError(f"condition `{name}` is {value}, no number", hint=f"`--condition {name}={known[name]:g}`")
    return {**known, **(asked or {})}
