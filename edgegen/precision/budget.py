"""What a plan may cost and spoil, and the plan that keeps to it: chosen by estimates, then held against measurements.

Names of costs: `latency <backend>`, as a share of the student's fp32 multiply-accumulates at the target's relative
times (estimated), and `bytes` (exact). Names of losses: `picture`, a squared error over the square of the peak, and
`conditioning`, a squared change of how far another prompt moves the denoiser's answer, as a share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgegen.errors import GateError
from edgegen.graph.count import count
from edgegen.graph.edit import weights
from edgegen.precision.choose import Choice, InfeasibleError, Item, Option, Problem, choose
from edgegen.precision.cost import Candidate, stored_bytes
from edgegen.precision.plan import Precision
from edgegen.precision.sensitivity import Effect, Key
from edgegen.precision.simulate import Network
from edgegen.targets import Target

Aim = Literal["latency", "size", "loss"]
ROUNDS = 8
"""How often a plan is measured and its budget moved before the best so far is taken."""
CLOSE_DB = 0.5
"""A plan that is measured this little above its floor is taken."""
START_DB = 22.0
"""Where the search starts when alignment alone is asked for."""
SCALES = {"picture": 1e-3, "conditioning": 0.05**2}
"""What counts as much as the other where losses are made small: 30 dB, five percent."""


@dataclass(frozen=True)
class Budget:
    """None asks for nothing. `latency`: backend -> at most this share of fp32's. `size` in bytes of all weights; `psnr`
    in dB, `conditioning` a share, `alignment` a share of prompts."""

    latency: Mapping[str, float] | None = None
    size: int | None = None
    psnr: float | None = None
    conditioning: float | None = None
    alignment: float | None = None
    aim: Aim = "latency"


@dataclass(frozen=True)
class Measured:
    """What a plan does to the student, measured in torch on the fake-quant reference."""

    psnr: float
    conditioning: float
    alignment: float | None = None

    def said(self) -> str:
        text = f"{self.psnr:.1f} dB, conditioning changed by {self.conditioning:.1%}"
        return text if self.alignment is None else f"{text}, alignment {self.alignment:.1%}"

    def keeps(self, budget: Budget) -> bool:
        return (
            (budget.psnr is None or self.psnr >= budget.psnr)
            and (budget.conditioning is None or self.conditioning <= budget.conditioning)
            and (budget.alignment is None or self.alignment is None or self.alignment >= budget.alignment)
        )


def psnr(loss: float) -> float:
    """Decibels of a loss; 200 for none at all, which JSON can say."""
    return 200.0 if loss <= 1e-20 else -10.0 * math.log10(loss)


def problem(
    networks: Mapping[str, Network],
    calls: Mapping[str, int],
    found: Mapping[Key, tuple[Candidate, ...]],
    effects: Mapping[Key, tuple[Effect, ...]],
    target: Target,
    backends: Sequence[str],
    base: Precision,
) -> Problem:
    """Every op with its candidates, the float one first; `effects` are those of the others, in order. `calls`: how
    often one picture calls each component."""
    macs = {name: count(network.program).macs * calls[name] for name, network in networks.items()}
    total = max(1, sum(macs.values()))
    rest, fixed_bytes = dict(macs), 0
    items = []
    for name, network in networks.items():
        own = {site.weight for site in network.sites.values()}
        for held, value in weights(network.program).items():
            if held not in own:
                halved = base == "fp16" and value.is_floating_point()
                fixed_bytes += value.numel() * 2 if halved else value.nbytes
        for key, site in network.sites.items():
            work = site.macs * calls[name]
            rest[name] -= work
            options = []
            known = (Effect(0.0), *effects.get((name, key), ()))
            for candidate, effect in zip(found[name, key], known, strict=True):
                channels = site.shape[site.axis] if site.weight else 1
                size = stored_bytes(site.shape, channels, candidate) if site.weight else 0
                costs = {f"latency {on}": work * time / total for on, time in candidate.time.items()}
                losses = {"picture": effect.picture, "conditioning": effect.conditioning}
                options.append(Option(candidate.precision, {**costs, "bytes": float(size)}, losses))
            items.append(Item(name, key, tuple(options)))
    fixed = {"bytes": float(fixed_bytes)}
    for on in backends:
        cost = target.backend(on).cost("matmul", base)
        fixed[f"latency {on}"] = sum(rest.values()) / total * (1.0 if cost is None or base == "fp32" else cost.time)
    return Problem(tuple(items), fixed)


def within(whole: Problem, budget: Budget, backends: Sequence[str]) -> Problem:
    """`whole` with the caps and the aim of `budget`."""
    caps: dict[str, float] = {}
    if budget.latency is not None:
        caps |= {f"latency {on}": most for on, most in budget.latency.items()}
    if budget.size is not None:
        caps["bytes"] = float(budget.size)
    if budget.psnr is not None:
        caps["picture"] = 10.0 ** (-budget.psnr / 10.0)
    elif budget.alignment is not None:
        caps["picture"] = 10.0 ** (-START_DB / 10.0)
    if budget.conditioning is not None:
        caps["conditioning"] = budget.conditioning**2
    aims = {
        "latency": {f"latency {on}": 1.0 for on in backends},
        "size": {"bytes": 1.0},
        "loss": {name: 1.0 / scale for name, scale in SCALES.items()},
    }
    return replace(whole, caps=caps, minimise=aims[budget.aim])


def settle(
    asked: Problem, budget: Budget, measure: Callable[[Choice], Measured], done: Callable[[], None] = lambda: None
) -> tuple[Choice, Measured]:
    """The best choice that was measured to keep to `budget`.

    Estimates decide what is tried; where a measurement says that they were too hopeful the caps on losses are drawn
    in, and let out where there is room. InfeasibleError when not even the estimates allow a plan; GateError when
    nothing that was tried keeps to the budget.
    """
    caps = dict(asked.caps)
    kept = {name: cap for name, cap in caps.items() if name not in SCALES}
    known: dict[tuple[str, ...], Measured] = {}
    good: tuple[Choice, Measured] | None = None
    nearest: Measured | None = None
    spoilt_prompts = False
    holds, fails = 0.0, math.inf  # picture losses that were measured to be within the budget, and not to be
    for _ in range(5 * ROUNDS):
        try:
            choice = choose(replace(asked, caps=caps))
        except InfeasibleError:
            if not known:
                raise
            break
        name = tuple(one.precision for one in choice.options)
        if name not in known:
            if len(known) == ROUNDS:
                break
            known[name] = measure(choice)
            done()
        found = known[name]
        room = found.psnr - (found.psnr if budget.psnr is None else budget.psnr)
        if found.keeps(budget):
            good, holds = (choice, found), max(holds, caps.get("picture", math.inf))
            loosest = choose(replace(asked, caps=kept)).options == choice.options
            if budget.psnr is None or room <= CLOSE_DB or loosest:
                break
            wanted = math.sqrt(holds * fails) if fails < math.inf else holds * 10.0 ** (max(room, 1.0) / 10.0)
            if budget.conditioning is not None and not spoilt_prompts and 2 * found.conditioning < budget.conditioning:
                caps["conditioning"] *= 4.0
        else:
            nearest = found if nearest is None or found.psnr > nearest.psnr else nearest
            if not set(caps) & set(SCALES):
                break
            if budget.conditioning is not None and found.conditioning > budget.conditioning:
                spoilt_prompts = True
                share = 0.8 * (budget.conditioning / found.conditioning) ** 2
                caps["conditioning"] = choice.totals["conditioning"] * share
                continue
            fails = min(fails, choice.totals["picture"])
            short = room if room < 0 else -3.0  # it is alignment that is missed
            wanted = math.sqrt(holds * fails) if holds else fails * 10.0 ** ((short - 0.3) / 10.0)
        if fails <= holds * 1.01:
            break
        caps["picture"] = wanted
    if good is not None:
        return good
    assert nearest is not None
    raise GateError(
        f"no plan that was tried keeps to the budget: the nearest is measured at {nearest.said()}",
        hint=f"ask for no more than that, or allow other precisions: `--min-psnr {math.floor(nearest.psnr)}`",
    )


_FLAGS = {"bytes": "--max-size", "picture": "--min-psnr", "conditioning": "--max-conditioning"}


def refused(error: InfeasibleError, asked: Problem) -> GateError:
    """What binds, in words: of each cap, the best that can be had while the others are kept; and the nearest plan."""
    lines = ["no plan keeps to this budget"]
    hint = None
    for name, best in error.best.items():
        wanted = _amount(name, asked.caps[name])
        if best is None:
            lines.append(f"  {wanted}: the others cannot be kept without it either")
        elif best > asked.caps[name] * (1 + 1e-9):
            lines.append(f"  {wanted} binds: with the others kept, the best is {_amount(name, best, bare=True)}")
            flag = _FLAGS.get(name, "--max-latency")
            hint = hint or f"`{flag} {_typed(name, best)}`"
        else:
            lines.append(f"  {wanted} alone could be kept")
    nearest = ", ".join(_amount(name, error.nearest.totals[name], bare=True) for name in asked.caps)
    lines.append(f"  the nearest plan: {nearest} (estimated)")
    return GateError("\n".join(lines), hint=hint or "allow more precisions, or ask for less of two budgets")


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
