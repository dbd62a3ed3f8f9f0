"""Two bundles of one student, one in fp32 and one of a plan: every artifact of both timed in turns, in one run.

    python tools/bench_bundles.py demo/fp32 demo/int8 --markdown docs/benchmarks/int8-shapes-latency.md

A turn is so many calls in a row (`--calls`) of the one artifact and then of the other, so that a machine that is busy
for a while slows both down; of each turn the mean counts, of all turns the median. A turn of 4 is one picture of four
steps, whose first call finds the other artifact's weights in the caches; a turn of 50 is pictures one after another.
Before a turn nothing runs for some milliseconds: threads that a runtime leaves waiting would take time from the next.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from turns import PAUSE, WARM_UP, on_cores, settings_of, turns

from edgegen.bundle.open import Bundle, open_bundle
from edgegen.cores import cores
from edgegen.lower.backend import Array, Executable, get_backend
from edgegen.lower.chain import load_artifact


@dataclass(frozen=True)
class Row:
    """Milliseconds of one call: the median of all turns, and the least."""

    backend: str
    component: str
    threads: int
    calls: int
    fp32_ms: float
    plan_ms: float
    fp32_least_ms: float
    plan_least_ms: float
    fp32_bytes: int
    plan_bytes: int

    @property
    def ratio(self) -> float:
        return self.plan_ms / self.fp32_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--backend", nargs="+", help="default: all that both bundles have")
    parser.add_argument("--component", nargs="+", default=["denoiser"])
    parser.add_argument("--threads", type=int, nargs="+", default=[cores()])
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--calls", type=int, nargs="+", default=[4, 50])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    bundles = open_bundle(options.fp32), open_bundle(options.plan)
    shared = [name for name in bundles[0].backends() if name in bundles[1].backends()]
    names = options.backend or shared
    said = f"{options.turns} of each artifact, medians, after {WARM_UP} that do not count"
    settings = settings_of(names, max(options.threads), turns=said)
    rows = []
    for threads in options.threads:
        for name in names:
            for part in options.component:
                rows += on_cores(threads, _rows, options.fp32, options.plan, name, part, options.calls, options.turns)
    settings["load average at the end"] = str(os.getloadavg())
    text = _markdown(settings, rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        found = {"settings": settings, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def _rows(fp32: Path, plan: Path, backend: str, component: str, calls: Sequence[int], repeats: int) -> list[Row]:
    """Of one component, one for each length of turns, with the cores that this process has."""
    bundles = open_bundle(fp32), open_bundle(plan)
    loaded = [_loaded(one, backend, component) for one in bundles]
    sizes = [one.artifacts(backend)[component].bytes for one in bundles]
    rows = []
    for in_a_row in calls:
        taken = turns([partial(run, given) for run, given in loaded], repeats, in_a_row=in_a_row, pause=PAUSE)
        medians, least = [statistics.median(one) * 1e3 for one in taken], [min(one) * 1e3 for one in taken]
        rows.append(Row(backend, component, cores(), in_a_row, *medians, *least, *sizes))
        named = f"{backend} {component}, {rows[-1].threads} threads, {in_a_row} calls"
        print(f"{named}: {rows[-1].fp32_ms:.2f} -> {rows[-1].plan_ms:.2f} ms, {rows[-1].ratio:.3f}", file=sys.stderr)
    for run, _ in loaded:
        run.close()
    return rows


def _loaded(bundle: Bundle, backend: str, component: str) -> tuple[Executable, Mapping[str, Array]]:
    """The artifact, and what it is called with: noise, and the first of the sampler's steps."""
    io, draw = bundle.manifest.components[component], np.random.default_rng(0)
    path = bundle.loadable(bundle.artifacts(backend)[component])
    run = load_artifact(get_backend(backend), path, io.inputs, io.outputs)
    given: dict[str, Array] = {}
    for spec in io.inputs:
        noise = draw.standard_normal(spec.shape).astype(np.float32)
        given[spec.name] = noise if spec.dtype == "float32" else np.zeros(spec.shape, spec.dtype)
    return run, given


def _markdown(settings: Mapping[str, str], rows: list[Row]) -> str:
    assert __doc__ is not None
    title = "# Latency of a plan's artifacts against their own fp32, in turns"
    lines = [title, "", __doc__.strip().split("\n\n")[-1], ""]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    lines += [
        "",
        "| backend | component | threads | calls | fp32 ms | plan ms | ratio | least ms, fp32, plan | MB, fp32, plan |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        least = f"{row.fp32_least_ms:.2f}, {row.plan_least_ms:.2f}"
        sizes = f"{row.fp32_bytes / 1e6:.2f}, {row.plan_bytes / 1e6:.2f}"
        named = [row.backend, row.component, str(row.threads), str(row.calls)]
        cells = [*named, f"{row.fp32_ms:.2f}", f"{row.plan_ms:.2f}", f"{row.ratio:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {least} | {sizes} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
