"""Which size of a student a build took, and the figures of every size that it had to choose from. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LevelFigures(BaseModel):
    """One size. All but `parameters` and `macs` (of a picture) are estimates, by backend: milliseconds of a picture
    where the target's speed is known, else only the share of the largest size's; bytes of the memory that its networks
    need at once, which has no entry where they do not fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parameters: int = Field(ge=0)
    macs: int = Field(ge=0)
    latency_ms_estimated: dict[str, float] = {}
    latency_share_estimated: dict[str, float] = {}
    memory_bytes_estimated: dict[str, int] = {}
    load: dict[str, Literal["together", "sequential"]] = {}
    """As `edgegen.bundle.memory.MemoryPlan` has it."""
    passed_over: tuple[str, ...] = ()
    """Why it is too large for the target; empty where it fits."""


class LevelChoice(BaseModel):
    """`name`: the level of a checkpoint that holds several, None for a student of one size that was held against a
    budget. `why`: who chose it. `budget`: the option that capped latency. `latency_source`: what the estimates are
    from. `levels`: those that were looked at, the largest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None
    why: str
    budget: str | None = None
    latency_source: str | None = None
    levels: tuple[LevelFigures, ...] = ()
