"""What a plan says of itself: estimates of time, exact bytes, and the other plans that could have been chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgegen.graph.edit import weights
from edgegen.precision.budget import Budget, Measured, psnr, within
from edgegen.precision.choose import Choice, Problem, pareto
from edgegen.precision.plan import FrontPoint
from edgegen.precision.simulate import Network
from edgegen.targets import Target

FRONT_POINTS = 12


def expected(
    choice: Choice,
    measured: Measured,
    correlation: float | None,
    target: Target,
    backends: Sequence[str],
    macs: int,
    fp32: float,
) -> dict[str, float]:
    """A plan's `predicted`. `macs` of one picture, `fp32` the bytes of all weights in fp32; milliseconds where
    somebody has measured how fast the target's runtime is."""
    shown = {
        **said(measured),
        "picture_psnr_db_estimated": round(psnr(choice.totals["picture"]), 3),
        "bytes": choice.totals["bytes"],
        "bytes_ratio": round(choice.totals["bytes"] / max(1.0, fp32), 4),
    }
    if correlation is not None:
        shown["rank_correlation"] = round(correlation, 4)
    for name in backends:
        ratio = choice.totals[f"latency {name}"]
        shown[f"latency_ratio_estimated.{name}"] = round(ratio, 4)
        speed = target.backend(name).speed
        if speed is not None:
            shown[f"latency_ms_estimated.{name}"] = round(ratio * 1e3 * macs / speed.macs_per_second, 3)
    return shown


def said(measured: Measured) -> dict[str, float]:
    """What of `predicted` was measured; `_sure`: what the worst of other prompts, those of a build, stays within
    (`edgegen.precision.margin`)."""
    shown = {
        "picture_psnr_db": round(measured.psnr, 3),
        "conditioning_change": round(measured.conditioning, 5),
    }
    if measured.psnr_least is not None:
        shown["picture_psnr_db_sure"] = round(measured.psnr_least, 3)
    if measured.conditioning_most is not None:
        shown["conditioning_change_sure"] = round(measured.conditioning_most, 5)
        shown["conditioning_pairs"] = measured.pairs
    if measured.alignment is not None:
        shown["alignment"] = round(measured.alignment, 4)
    return shown


def measured_of(predicted: Mapping[str, float]) -> Measured:
    """What `said` was said of, as far as it was rounded."""
    return Measured(
        predicted["picture_psnr_db"],
        predicted["conditioning_change"],
        predicted.get("alignment"),
        predicted.get("picture_psnr_db_sure"),
        predicted.get("conditioning_change_sure"),
        int(predicted.get("conditioning_pairs", 0)),
    )


def fp32_bytes(networks: Mapping[str, Network]) -> float:
    """Of all weights, in fp32 where they are floats."""
    return float(
        sum(
            value.numel() * 4 if value.is_floating_point() else value.nbytes
            for network in networks.values()
            for value in weights(network.program).values()
        )
    )


def front(whole: Problem, backends: Sequence[str]) -> tuple[FrontPoint, ...]:
    """The plans of least estimated loss, from the fastest with the first backend to the most faithful."""
    asked = within(whole, Budget(aim="loss"), backends)
    along = f"latency {backends[0]}"
    return tuple(
        FrontPoint(
            latency_ratio=round(one.totals[along], 4),
            bytes=int(one.totals["bytes"]),
            picture_psnr_db=round(psnr(one.totals["picture"]), 2),
        )
        for one in pareto(asked, along, FRONT_POINTS)
    )
