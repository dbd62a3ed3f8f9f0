"""What the passes did to each graph, as the report and the terminal show it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Records = Sequence[Mapping[str, Any]]
"""Records of `edgegen.rewrite.pipeline.PassRecord`, as JSON."""


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


def rewrites_by_backend(
    passes: Mapping[str, Mapping[str, Records]],
) -> dict[str, list[ComponentRewrites]]:
    """Backend -> its components, those without any pass left out."""
    found = {
        backend: [_component(name, records) for name, records in parts.items() if records]
        for backend, parts in passes.items()
    }
    return {backend: parts for backend, parts in found.items() if parts}


def timing_table(passes: Mapping[str, Mapping[str, Records]]) -> str:
    """A line a pass: where it ran, the ops before and after it, and its seconds."""
    head = ("backend", "component", "pass", "ops", "seconds")
    rows = [head]
    for backend, parts in passes.items():
        for component, records in parts.items():
            for one in records:
                name = str(one["spec"]).partition("{")[0]
                ops = f"{one['ops_before']} -> {one['ops_after']}" if one["modified"] else "unchanged"
                rows.append((backend, component, name, ops, f"{one['seconds']:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _component(name: str, records: Records) -> ComponentRewrites:
    changes = tuple(Change(_short(one["spec"]), _difference(one)) for one in records if one["modified"])
    misses: dict[tuple[str, str, str], list[str]] = {}
    for one in records:
        for miss in one["declined"]:
            key = (str(one["spec"]).partition("{")[0], miss["op"], miss["reason"])
            misses.setdefault(key, []).append(miss["module"] or miss["node"])
    declined = tuple(NearMiss(*key, where=places[0], count=len(places)) for key, places in misses.items())
    return ComponentRewrites(name, records[0]["ops_before"], records[-1]["ops_after"], changes, declined)


def _short(spec: str) -> str:
    return spec if len(spec) <= 80 else f"{spec[:77]}..."


def _difference(record: Mapping[str, Any]) -> str:
    """`-25 aten.group_norm, +75 aten.mul`, the largest changes first."""
    parts = [f"−{count} {op}" for op, count in list(record["removed"].items())[:4]]
    parts += [f"+{count} {op}" for op, count in list(record["added"].items())[:4]]
    return ", ".join(parts) or "no change in ops"
