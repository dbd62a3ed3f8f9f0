"""What `edgegen prune --levels` made, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgegen.graph.count import GraphCount
    from edgegen.prune.nested import Nested
    from edgegen.prune.training import Judged


def levels_text(made: Nested) -> str:
    """A row a level, and one of the student that they were cut out of."""
    scenes = made.whole_alignment is not None
    cut = "".join(f"{f'{name} MACs':>24}" for name in made.cut)
    backends = list(made.whole_latency)
    lines = [
        f"  {'level':<20}{'parameters':>14}{cut}"
        + "".join(f"{f'{name} ms':>16}" for name in backends)
        + f"{'before healing':>22}{'after':>22}"
    ]

    def row(name: str, counts: Mapping[str, GraphCount], latency: Mapping[str, float], before: str, after: str) -> str:
        macs = ""
        for part in made.cut:
            share_left = counts[part].macs / max(1, made.whole[part].macs)
            macs += f"{f'{counts[part].macs / 1e6:,.1f} M {share_left:.3f}':>24}"
        times = "".join(f"{latency[one]:>16.3g}" for one in backends)
        parameters = sum(one.parameters for one in counts.values())
        return f"  {name:<20}{parameters:>14,}{macs}{times}{before:>22}{after:>22}".rstrip()

    def drawn(one: Judged | None) -> str:
        if one is None:
            return "not healed"
        return f"{one.psnr_db:.1f} dB" if one.alignment is None else f"{one.alignment:.3f}, {one.psnr_db:.1f} dB"

    whole = f"{made.whole_alignment:.3f}" if scenes else ""
    lines.append(row("(whole)", made.whole, made.whole_latency, whole, ""))
    for one in made.levels:
        lines.append(row(one.name, one.counts, one.latency, drawn(one.before), drawn(one.after)))
        lines += [f"    passed by: {part}/{path}" for part, paths in one.removed.items() for path in paths]
    lines.append("")
    if backends:
        lines.append(f"  latency       of a picture, estimated from {made.latency_source}")
    lines.append(
        f"  pictures      {'alignment, and ' if scenes else ''}PSNR to those of the whole student, of prompts that "
        "nothing was learned from"
    )
    if made.healed_steps is None:
        lines.append(
            "  not healed    the levels are recorded and nothing was trained: `--heal 2000` trains them together"
        )
    else:
        lines.append(f"  healed        {made.healed_steps} steps of each network, all levels together")
    return "\n".join(lines)
