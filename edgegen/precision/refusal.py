"""A budget that no plan keeps to, in words: what of it binds, and the nearest that can be had."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from edgegen.errors import GateError
from edgegen.precision.budget import SCALES, Budget, Measured, psnr
from edgegen.precision.choose import Choice, InfeasibleError, Problem
from edgegen.precision.settle import MissedError, most_faithful, settle

_FLAGS = {"bytes": "--max-size", "picture": "--min-psnr", "conditioning": "--max-conditioning"}
Measure = Callable[[Choice], Measured]


def refused(
    error: InfeasibleError | MissedError,
    asked: Problem,
    budget: Budget,
    measure: Measure,
    done: Callable[[], None] = lambda: None,
) -> GateError:
    """What binds, and the nearest points that can be had: for each cap on time or bytes the least with which the
    quality can be kept, and the quality that can be had within those caps. Both are measured, so that what the hint
    says holds when it is typed.
    """
    if isinstance(error, InfeasibleError):
        lines = ["no plan keeps to this budget", *_estimated(error, asked)]
    else:
        lines = [f"no plan that was tried keeps to the budget: the nearest is measured at {error.nearest.said()}"]
        lines += _misses(error.nearest, budget)
    hints = []
    costs = {name: cap for name, cap in asked.caps.items() if name not in SCALES}
    quality = len(costs) < len(asked.caps)
    for flag in dict.fromkeys(map(_flag, costs)) if quality else ():
        own = [name for name in costs if _flag(name) == flag]  # one option is a cap on the time with every backend
        rest = {name: cap for name, cap in asked.caps.items() if name not in own}
        try:
            least, found = settle(replace(asked, caps=rest, minimise=dict.fromkeys(own, 1.0)), budget, measure, done)
        except (InfeasibleError, MissedError):
            continue
        if any(least.totals[name] > costs[name] * (1 + 1e-9) for name in own):
            said = " and ".join(_amount(name, least.totals[name], bare=True) for name in own)
            lines.append(f"  {said} keeps the quality: {found.said()}")
            hints.append(f"`{flag} {_typed(own[0], max(least.totals[name] for name in own))}`")
    if quality and costs:
        try:
            best = most_faithful(asked, costs)
        except InfeasibleError:
            best = None
        if best is not None:
            found = measure(best)
            done()
            lines.append(f"  what loses least within {_all(costs)} is measured at {found.said()}")
            if found.misses(budget):
                hints.append(f"`{_softer(found, budget)}`")
    elif isinstance(error, MissedError):
        hints.append(f"`{_softer(error.nearest, budget)}`")
    elif not quality:
        hints += [
            f"`{_flag(name)} {_typed(name, best)}`"
            for name, best in error.best.items()
            if best is not None and best > asked.caps[name] * (1 + 1e-9)
        ]
    hint = f"ask for {' or '.join(hints)}, or allow more precisions" if hints else "allow more precisions"
    return GateError("\n".join(lines), hint=hint)


def _estimated(error: InfeasibleError, asked: Problem) -> list[str]:
    """Of each cap, the best that can be had by the estimates while the others are kept; and the nearest plan."""
    lines = []
    for name, best in error.best.items():
        wanted = _amount(name, asked.caps[name])
        if best is None:
            lines.append(f"  {wanted}: without it the others still contradict each other")
        elif best > asked.caps[name] * (1 + 1e-9):
            lines.append(
                f"  {wanted} binds: with the others kept, the best is {_amount(name, best, bare=True)} (estimated)"
            )
        else:
            lines.append(f"  {wanted} alone could be kept")
    nearest = ", ".join(_amount(name, error.nearest.totals[name], bare=True) for name in asked.caps)
    return [*lines, f"  the nearest plan: {nearest} (estimated)"]


def _misses(found: Measured, budget: Budget) -> list[str]:
    said = {
        "psnr": f"  PSNR >= {budget.psnr} dB binds: {found.sure_psnr:.1f} dB are sure",
        "conditioning": f"  conditioning within {budget.conditioning} binds: {found.sure_conditioning:.2%} are sure",
        "alignment": f"  alignment >= {budget.alignment} binds: {found.alignment} is measured",
    }
    return [said[name] for name in found.misses(budget)]


def _softer(found: Measured, budget: Budget) -> str:
    """The options that `found` keeps to, of those of `budget` that it misses."""
    options = {
        "psnr": f"--min-psnr {max(0, math.floor(found.sure_psnr * 10) / 10):g}",
        "conditioning": f"--max-conditioning {_typed('conditioning', found.sure_conditioning**2)}",
        "alignment": f"--min-alignment {math.floor((found.alignment or 0.0) * 1e3) / 1e3:g}",
    }
    return " ".join(options[name] for name in found.misses(budget))


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--max-latency")


def _all(costs: dict[str, float]) -> str:
    return " and ".join(_amount(name, cap) for name, cap in costs.items())


def _amount(name: str, value: float, *, bare: bool = False) -> str:
    if name == "bytes":
        return f"size {'' if bare else '<= '}{value:,.0f} bytes"
    if name == "picture":
        return f"PSNR {'' if bare else '>= '}{psnr(value):.2f} dB"
    if name == "conditioning":
        return f"conditioning within {math.sqrt(max(0.0, value)):.2%}"
    return f"{name} {'' if bare else '<= '}{value:.4f} of fp32"


def _typed(name: str, value: float) -> str:
    """Rounded to the side that can be kept."""
    if name == "bytes":
        return str(math.ceil(value))
    if name == "picture":
        return f"{math.floor(psnr(value) * 100) / 100:g}"
    if name == "conditioning":
        return f"{math.ceil(math.sqrt(max(0.0, value)) * 1e4) / 1e4:g}"
    return f"{math.ceil(value * 1e4) / 1e4:g}"
