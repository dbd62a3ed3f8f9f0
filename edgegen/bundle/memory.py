"""How a bundle's networks share a device's memory: what an app loads when, and what it lets go. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ComponentMemory(BaseModel):
    """Estimated bytes of one component: of its weights, and of the values that are alive at once while it runs.

    `parts`: into how many files it is cut, of which one lies in memory at a time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: int = Field(ge=0)
    activations: int = Field(ge=0)
    parts: int = Field(default=1, ge=1)

    @property
    def peak(self) -> int:
        """While it runs alone."""
        return -(-self.weights // self.parts) + self.activations


class MemoryPlan(BaseModel):
    """What one backend's artifacts need and how they are to be loaded, by estimate.

    `together`: all are loaded before the first runs. `sequential`: each is loaded, run (a denoiser for all its steps)
    and let go before the next; a component in parts, part by part.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    load: Literal["together", "sequential"]
    ceiling_bytes: int
    ceiling_source: str
    components: dict[str, ComponentMemory]
    why: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """Estimated, of networks alone."""
        parts = self.components.values()
        if self.load == "sequential":
            return max((one.peak for one in parts), default=0)
        return sum(one.weights for one in parts) + max((one.activations for one in parts), default=0)
