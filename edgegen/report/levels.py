"""The sizes that a build chose from, as lines for a terminal. Imports no torch."""

from __future__ import annotations

from edgegen.bundle.level import LevelChoice, LevelFigures


def level_lines(choice: LevelChoice) -> list[str]:
    """What was taken, a line of figures for each size, and why the larger ones were passed over."""
    budget = "" if choice.budget is None else f", {choice.budget}"
    lines = [f"{'the only size' if choice.name is None else f'`{choice.name}`, {choice.why}'}{budget}"]
    for one in choice.levels:
        mark = "*" if choice.name in (None, one.name) else " "
        lines.append(f"{mark} {one.name:<16} {', '.join(figures(one))}")
        lines += [f"  {'':<16} passed over: {why}" for why in one.passed_over]
    if choice.latency_source is not None:
        lines.append(f"latency is estimated from {choice.latency_source}")
    return lines


def figures(one: LevelFigures) -> list[str]:
    """Each with its unit, estimates called so."""
    made = [f"{one.parameters:,} parameters", f"{one.macs / 1e6:,.1f} M MACs a picture"]
    for backend in dict.fromkeys((*one.latency_ms_estimated, *one.latency_share_estimated)):
        time, share = one.latency_ms_estimated.get(backend), one.latency_share_estimated.get(backend)
        texts = [] if time is None else [f"{time:.3g} ms"]
        texts += [] if share is None else [f"{share:.3f} of the largest"]
        made.append(f"{' = '.join(texts)} with {backend} (estimated)")
    for backend, size in one.memory_bytes_estimated.items():
        turns = ", networks loaded in turn" if one.load.get(backend) == "sequential" else ""
        made.append(f"{size / 2**20:.1f} MiB with {backend}{turns} (estimated)")
    return made
