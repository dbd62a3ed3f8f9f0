"""What a plan may cost and spoil, and the plan that keeps to it: chosen by estimates, then held against measurements.

Names of costs: `latency <backend>`, as a share of what the student takes in fp32 by the target's relative times
(estimated), and `bytes` (exact). Names of losses: `picture`, a squared error over the square of the peak, and
`conditioning`, a squared change of how far another prompt moves the denoiser's answer, as a share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgegen.graph.count import count
from edgegen.graph.edit import weights
from edgegen.precision.choose import Item, Option, Problem
from edgegen.precision.cost import Candidate, stored_bytes, work_of
from edgegen.precision.plan import Precision
from edgegen.precision.sensitivity import Effect, Key
from edgegen.precision.simulate import Network
from edgegen.targets import Target

Aim = Literal["latency", "size", "loss"]
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
    """What a plan does to the student, measured: the pictures of that number of steps which loses most, and the worst
    step of the worst pair of prompts. `psnr_least`, `conditioning_most`: what the worst of a build stays within
    (`edgegen.precision.margin`), which is what budgets are held against; None where there is one sample only."""

    psnr: float
    conditioning: float
    alignment: float | None = None
    psnr_least: float | None = None
    conditioning_most: float | None = None
    pairs: int = 0
    """Of prompts that conditioning was measured on."""

    @property
    def sure_psnr(self) -> float:
        return self.psnr if self.psnr_least is None else self.psnr_least

    @property
    def sure_conditioning(self) -> float:
        return self.conditioning if self.conditioning_most is None else self.conditioning_most

    def said(self) -> str:
        sure = [
            "" if self.psnr_least is None else f" (>= {self.psnr_least:.1f} of other prompts)",
            "" if self.conditioning_most is None else f" (<= {self.conditioning_most:.1%})",
        ]
        text = f"{self.psnr:.1f} dB{sure[0]}, conditioning changed by {self.conditioning:.1%}{sure[1]}"
        return text if self.alignment is None else f"{text}, alignment {self.alignment:.1%}"

    def misses(self, budget: Budget) -> tuple[str, ...]:
        """What of `budget` is not kept: `psnr`, `conditioning`, `alignment`."""
        kept = {
            "psnr": budget.psnr is None or self.sure_psnr >= budget.psnr,
            "conditioning": budget.conditioning is None or self.sure_conditioning <= budget.conditioning,
            "alignment": budget.alignment is None or self.alignment is None or self.alignment >= budget.alignment,
        }
        return tuple(name for name, holds in kept.items() if not holds)

    def short(self, budget: Budget) -> float:
        """How far outside `budget`: the greatest of what is missed, each as a share of what was asked."""
        return max(
            0.0 if budget.psnr is None else 10.0 ** ((budget.psnr - self.sure_psnr) / 20.0),
            0.0 if budget.conditioning is None else self.sure_conditioning / max(budget.conditioning, 1e-12),
            0.0 if budget.alignment is None else budget.alignment / max(self.alignment or 0.0, 1e-12),
        )

    def keeps(self, budget: Budget) -> bool:
        return not self.misses(budget)

    def spoils(self, other: Measured) -> tuple[str, ...]:
        """What is worse here than in `other`: `psnr`, `conditioning` and what the worst of a build stays within."""
        worse = {
            "psnr": self.psnr < other.psnr or self.sure_psnr < other.sure_psnr,
            "conditioning": self.conditioning > other.conditioning or self.sure_conditioning > other.sure_conditioning,
            "alignment": self.alignment is not None and self.alignment < (other.alignment or 0.0),
        }
        return tuple(name for name, one in worse.items() if one)


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
    whole = _whole(networks, calls, target, backends)
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
                costs = {f"latency {on}": work * time / whole[on] for on, time in candidate.time.items()}
                losses = {"picture": effect.picture, "conditioning": effect.conditioning}
                options.append(Option(candidate.precision, {**costs, "bytes": float(size)}, losses))
            items.append(Item(name, key, tuple(options)))
    fixed = {"bytes": float(fixed_bytes)}
    for on in backends:
        cost = target.backend(on).cost("matmul", base)
        time = 1.0 if cost is None or base == "fp32" else cost.time
        fixed[f"latency {on}"] = sum(rest.values()) / whole[on] * time
    return Problem(tuple(items), fixed)


def _whole(
    networks: Mapping[str, Network], calls: Mapping[str, int], target: Target, backends: Sequence[str]
) -> dict[str, float]:
    """What one picture takes in fp32 with each backend: its multiply-accumulates, and as many as would take as long as
    what small ops do besides."""
    found = {}
    for on in backends:
        runtime = target.backend(on)
        found[on] = 0.0
        for name, network in networks.items():
            sites = network.sites.values()
            more = sum(site.macs * (runtime.time(site.kind, "fp32", *work_of(site)) - 1.0) for site in sites)
            found[on] += calls[name] * (count(network.program).macs + more)
        found[on] = max(1.0, found[on])
    return found


def costs_like(
    whole: Problem, precisions: Mapping[str, Mapping[str, str]], backends: Sequence[str]
) -> tuple[dict[str, float], int]:
    """Backend -> share of fp32's latency, and bytes, of the plan with these precisions, component -> module path; the
    float where none is named or an op has none of that name."""
    totals = dict(whole.fixed)
    for item in whole.items:
        wanted = precisions.get(item.component, {}).get(item.key.split("#")[0])
        like = [one for one in item.options if one.precision == wanted] or [item.options[0]]
        for name, cost in min(like, key=lambda one: one.losses["picture"]).costs.items():
            totals[name] = totals.get(name, 0.0) + cost
    # A sum in another order may come out a little larger.
    return {on: totals[f"latency {on}"] * (1 + 1e-9) for on in backends}, math.ceil(totals["bytes"])


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
