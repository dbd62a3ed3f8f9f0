"""What the passes did to each graph, as the report and the terminal show it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Records = Sequence[Mapping[str, Any]]
"""Records of `edgegen.rewrite.pipeline.PassRecord`, as JSON."""
Rewrites = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Backend -> component -> `passes`, `hazards` and `forecast`: `reports/rewrites.json`."""


@dataclass(frozen=True)
class Change:
    """One pass that changed a graph: `text` says which ops came and went."""

    spec: str
    text: str


@dataclass(frozen=True)
class NearMiss:
    """One reason of one pass, for all the nodes that it was given for; `where` is the first of them."""

    by: str
    op: str
    reason: str
    where: str
    count: int


@dataclass(frozen=True)
class ComponentRewrites:
    """One component on its way from capture to one backend; `before` and `after` count ops."""

    component: str
    before: int
    after: int
    changes: tuple[Change, ...]
    declined: tuple[NearMiss, ...]
    hazards: Records
    """Records of `edgegen.rewrite.half_hazards.Hazard`: what float16 would have broken."""
    foreseen: int | None
    """Pieces that the delegate was expected to make, None where the device decides."""


def rewrites_by_backend(rewrites: Rewrites) -> dict[str, list[ComponentRewrites]]:
    """Backend -> its components, those without any pass left out."""
    found = {
        backend: [_component(name, one) for name, one in parts.items() if one["passes"]]
        for backend, parts in rewrites.items()
    }
    return {backend: parts for backend, parts in found.items() if parts}


def timing_table(rewrites: Rewrites) -> str:
    """A line a pass: where it ran, the ops before and after it, and its seconds."""
    head = ("backend", "component", "pass", "ops", "seconds")
    rows = [head]
    for backend, parts in rewrites.items():
        for component, part in parts.items():
            for one in part["passes"]:
                name = str(one["spec"]).partition("{")[0]
                ops = f"{one['ops_before']} -> {one['ops_after']}" if one["modified"] else "unchanged"
                rows.append((backend, component, name, ops, f"{one['seconds']:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _component(name: str, part: Mapping[str, Any]) -> ComponentRewrites:
    records: Records = part["passes"]
    changes = tuple(Change(_short(one["spec"]), _difference(one)) for one in records if one["modified"])
    misses: dict[tuple[str, str, str], list[str]] = {}
    for one in records:
        for miss in one["declined"]:
            key = (str(one["spec"]).partition("{")[0], miss["op"], miss["reason"])
            misses.setdefault(key, []).append(miss["module"] or miss["node"])
    declined = tuple(NearMiss(*key, where=places[0], count=len(places)) for key, places in misses.items())
    return ComponentRewrites(
        name,
        records[0]["ops_before"],
        records[-1]["ops_after"],
        changes,
        declined,
        part["hazards"],
        part["forecast"]["pieces"],
    )


def _short(spec: str) -> str:
    return spec if len(spec) <= 80 else f"{spec[:77]}..."


def _difference(record: Mapping[str, Any]) -> str:
    """`-25 aten.group_norm, +75 aten.mul`, the largest changes first."""
    parts = [f"−{count} {op}" for op, count in list(record["removed"].items())[:4]]
    parts += [f"+{count} {op}" for op, count in list(record["added"].items())[:4]]
    return ", ".join(parts) or "no change in ops"
