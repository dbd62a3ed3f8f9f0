"""Deciding how networks share a device's memory: loaded together or one by one, whole or in parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from edgegen.bundle.memory import ComponentMemory, MemoryPlan
from edgegen.errors import EdgegenError

SHARE = 0.8
"""Of what an app may use, this much is planned for; the rest is the app's own and for what runtimes copy."""
PARTS_LIMIT = 16


class Ceiling(BaseModel):
    """Bytes that one app may use on the target, and who says so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    source: str

    @property
    def planned(self) -> int:
        return int(SHARE * self.bytes)


@dataclass(frozen=True)
class Need:
    """Estimated bytes of one component with one backend; `file` is its artifact's size, `file_limit` the most that the
    backend's format holds, and who says so."""

    weights: int
    activations: int
    file_limit: tuple[int, str] | None = None


class TooLarge(EdgegenError):
    """A component does not fit, whatever is done with its weights: its values alone are too many."""

    def __init__(self, message: str, component: str, spare: int, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.component = component
        self.spare = spare
        """Bytes that its values may take."""


def share_memory(needs: Mapping[str, Need], ceiling: Ceiling, *, splittable: bool = True) -> MemoryPlan:
    """The least intrusive way in which `needs` fit below `ceiling`: together, then one by one, then in parts.

    `splittable` False: no component may be cut into parts (a package of functions). TooLarge names the component
    that does not fit and what it would need.
    """
    limit = ceiling.planned
    why = [f"{_mib(limit)} are planned with: {SHARE:.0%} of {_mib(ceiling.bytes)} ({ceiling.source})"]
    parts = {name: _for_the_file(name, need, why) for name, need in needs.items()}
    together = sum(need.weights for need in needs.values()) + max(need.activations for need in needs.values())
    if together <= limit and all(count == 1 for count in parts.values()):
        why.append(f"all components together need {_mib(together)}")
        return _plan("together", needs, parts, ceiling, why)
    if together <= limit:
        why.append(f"all components together need {_mib(together)}, but not every one is a single file")
    else:
        why.append(f"all components together need {_mib(together)}: each is loaded, run and let go")
    for name, need in needs.items():
        spare = limit - need.activations
        whole = need.weights + need.activations
        if spare <= 0 or math.ceil(need.weights / spare) > PARTS_LIMIT:
            raise TooLarge(
                f"component `{name}` needs {_mib(need.activations)} for its values and {_mib(need.weights)} for its "
                f"weights, and {_mib(limit)} are there",
                name,
                limit - need.weights,
                "build for a target with more memory, or a student of a smaller picture; "
                "`--max-memory` says what the app may use where you know better than the target file",
            )
        count = max(parts[name], math.ceil(need.weights / spare))
        if count > parts[name]:
            why.append(f"`{name}` alone needs {_mib(whole)}: it is cut into {count} parts")
        parts[name] = count
    cut = [name for name, count in parts.items() if count > 1]
    if cut and not splittable:
        raise TooLarge(
            f"component `{cut[0]}` has to be cut into {parts[cut[0]]} parts, and a package of functions holds it whole",
            cut[0],
            limit - needs[cut[0]].weights,
            "build without `--one-package`",
        )
    return _plan("together" if together <= limit else "sequential", needs, parts, ceiling, why)


def _for_the_file(name: str, need: Need, why: list[str]) -> int:
    """Parts that the file's format asks for."""
    if need.file_limit is None or need.weights < need.file_limit[0]:
        return 1
    bytes_, source = need.file_limit
    count = math.ceil(need.weights / (SHARE * bytes_))
    why.append(
        f"`{name}` has {_mib(need.weights)} of weights and a file holds {_mib(bytes_)} ({source}): {count} parts"
    )
    return count


def _plan(
    load: str, needs: Mapping[str, Need], parts: Mapping[str, int], ceiling: Ceiling, why: list[str]
) -> MemoryPlan:
    return MemoryPlan.model_validate(
        {
            "load": load,
            "ceiling_bytes": ceiling.bytes,
            "ceiling_source": ceiling.source,
            "components": {
                name: ComponentMemory(weights=need.weights, activations=need.activations, parts=parts[name])
                for name, need in needs.items()
            },
            "why": tuple(why),
        }
    )


def _mib(count: int) -> str:
    if count < 2**20 // 10:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.1f} MiB"
