"""A budget that no widths, blocks and precisions keep to, in words: what of it binds, and the nearest that can be
had."""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgegen.errors import GateError
from edgegen.prune.search import NoFitError

NEARLY = 1 + 1e-6


def refused(error: NoFitError, caps: Mapping[str, float], whole: Mapping[str, float]) -> GateError:
    """`caps` are those of the problem, `whole` the costs of the student as it is, which shares are of."""
    lines = ["no legal network keeps to this budget"]
    hints = []
    for name, cap in caps.items():
        best = error.best.get(name)
        if best is None:
            lines.append(f"  {_amount(name, cap, whole)}: without it the others still contradict each other")
        elif best > cap * NEARLY:
            lines.append(
                f"  {_amount(name, cap, whole)} binds: with the others kept, the least is {_amount(name, best, whole)}"
            )
            if whole.get(name):
                hints.append(f"{name} {math.ceil(best / whole[name] * 1e4) / 1e2:g}%")
        else:
            lines.append(f"  {_amount(name, cap, whole)} alone could be kept")
    nearest = ", ".join(_amount(name, error.nearest.totals[name], whole) for name in caps)
    lines.append(f"  the nearest that there is: {nearest}")
    return GateError("\n".join(lines), hint=f"allow {' or '.join(hints)}" if hints else "allow more of each")


def _amount(name: str, value: float, whole: Mapping[str, float]) -> str:
    if name == "picture":
        return f"PSNR {-10 * math.log10(max(value, 1e-20)):.2f} dB"
    unit = " ms (estimated)" if name.startswith("latency") else ""
    text = f"{name} {value:,.3f}{unit}" if unit else f"{name} {value:,.0f}"
    return f"{text}, {value / whole[name]:.3f} of what it is" if whole.get(name) else text
