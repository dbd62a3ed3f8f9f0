"""What a precision costs with each runtime, by the shape of the op: the numbers of `targets/delegates/*.toml`.

    python tools/bench_costs.py --backend onnx tflite executorch --markdown docs/benchmarks/costs.md --json costs.json

Chains of eight equal linears, or convolutions of 3x3, between norms, activations and sums as networks have them,
lowered by our backends in each precision and called in turns. To the medians of all shapes of one runtime, op and
precision a time for each multiply-accumulate, each value read or written and each call is fitted (least squares of
relative errors, none below zero); in the tables they are over the time of a fp32 multiply-accumulate, so the first is
what a large op takes against fp32. What stands between the ops is in the time for values and calls, the same in every
precision.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.export import ExportedProgram
from turns import PAUSE, WARM_UP, in_turns, keep_to, request_of, settings_of

from edgegen.cores import cores
from edgegen.graph.evaluate import evaluate
from edgegen.lower.backend import get_backend
from edgegen.precision.cost import places, refusal, work_of
from edgegen.precision.plan import ComponentPlan, OpPlan, Range
from edgegen.precision.quantize import on_grid, quantized, settled, tail
from edgegen.precision.sites import resolve, sites
from edgegen.rewrite.choose import shape_preset
from edgegen.rewrite.pipeline import Pipeline
from edgegen.targets import load_target
from edgegen.targets.model import ExecutablePrecision

TARGET = "linux-x86"
PRECISIONS: tuple[ExecutablePrecision, ...] = ("fp32", "w8a8", "w8a8-dynamic")
IN_A_ROW = 4
BLOCKS = 4
"""Of two ops each."""
LINEARS = ((16, 128, 128), (64, 128, 128), (64, 128, 512), (256, 96, 96), (256, 96, 384), (256, 320, 1280))
"""Rows, channels, inner channels."""
CONVS = ((8, 64, 64), (8, 128, 128), (16, 64, 64), (16, 96, 96), (16, 192, 96), (16, 256, 256))
"""Edge of the picture, channels, inner channels."""


class Linears(nn.Module):
    """tokens [1, M, K] -> the same."""

    def __init__(self, rows: int, channels: int, inner: int) -> None:
        super().__init__()
        self.inputs = (torch.randn(1, rows, channels),)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(BLOCKS))
        self.up = nn.ModuleList(nn.Linear(channels, inner) for _ in range(BLOCKS))
        self.down = nn.ModuleList(nn.Linear(inner, channels) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(norm(x))))
        return x


class Convs(nn.Module):
    """image [1, C, E, E] -> the same; its first convolution stays float, as some runtimes want it."""

    def __init__(self, edge: int, channels: int, inner: int) -> None:
        super().__init__()
        self.inputs = (torch.randn(1, 4, edge, edge),)
        self.first = nn.Conv2d(4, channels, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(BLOCKS))
        self.up = nn.ModuleList(nn.Conv2d(channels, inner, 3, padding=1) for _ in range(BLOCKS))
        self.down = nn.ModuleList(nn.Conv2d(inner, channels, 3, padding=1) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.silu(up(nn.functional.silu(norm(x)))))
        return x


@dataclass(frozen=True)
class Timed:
    """A chain in one precision: work of one of its ops, and seconds that one took, its share of what lies between."""

    backend: str
    op: str
    precision: str
    shape: tuple[int, int, int]
    macs: int
    values: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("onnx", "tflite", "executorch"), nargs="+", default=["onnx"])
    parser.add_argument("--op", choices=("linear", "conv"), nargs="+", default=["linear", "conv"])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=25, help="turns of each artifact that count")
    parser.add_argument("--rows", type=Path, help="measure nothing: tables of what an earlier run wrote as --json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.rows:
        known = json.loads(options.rows.read_text())
        _write(options, known["settings"], [Timed(**{**row, "shape": tuple(row["shape"])}) for row in known["rows"]])
        return
    keep_to(options.threads)
    torch.manual_seed(0)
    repeats = (
        f"{options.repeats} turns of {IN_A_ROW} calls of each artifact, medians, after {WARM_UP} that do not count"
    )
    settings = settings_of(options.backend, options.threads, repeats=repeats)
    rows: list[Timed] = []
    with tempfile.TemporaryDirectory(prefix="bench-costs-") as folder, torch.no_grad():
        for backend in options.backend:
            for op in options.op:
                for shape in LINEARS if op == "linear" else CONVS:
                    made = _timed(backend, op, shape, Path(folder), options.repeats)
                    rows += made
                    said = ", ".join(f"{one.precision} {one.seconds * 1e6:.1f}" for one in made)
                    print(f"{backend} {op} {shape}: us an op: {said}", file=sys.stderr, flush=True)
    settings["load average at the end"] = str(os.getloadavg())
    _write(options, settings, rows)
    if options.json:
        found = {"settings": settings, "rows": [vars(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def _write(options: argparse.Namespace, settings: Mapping[str, str], rows: Sequence[Timed]) -> None:
    text = _markdown(settings, rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


def _timed(backend: str, op: str, shape: tuple[int, int, int], folder: Path, repeats: int) -> list[Timed]:
    module = (Linears if op == "linear" else Convs)(*shape).eval()
    program = torch.export.export(module, module.inputs)
    known = sites(program)
    at = places(program, known)
    on = load_target(TARGET).backend(backend)
    calls: list[Callable[[], object]] = []
    names: list[str] = []
    for precision in PRECISIONS:
        if precision != "fp32" and on.cost(known["up.0"].kind, precision) is None:
            continue  # what no plan uses has no kernel either
        if any(refusal(site.kind, precision, at[key], on) for key, site in known.items() if key != "first"):
            continue
        wanted = [key for key in known if key != "first"]
        plan = {} if precision == "fp32" else _plan(program, module.inputs, wanted, precision)
        path = folder / f"{backend}-{op}-{'-'.join(map(str, shape))}-{precision}"
        path.mkdir()
        calls.append(_artifact(backend, program, plan, path, module.inputs))
        names.append(precision)
    work = work_of(known["up.0"])
    medians = in_turns(calls, repeats, in_a_row=IN_A_ROW, pause=PAUSE)
    ops = 2 * BLOCKS
    return [
        Timed(backend, op, name, shape, work.macs, work.values, seconds / ops)
        for name, seconds in zip(names, medians, strict=True)
    ]


def _plan(program: ExportedProgram, inputs: Sequence[Tensor], keys: Sequence[str], precision: str) -> dict[str, OpPlan]:
    """Ranges are those of these inputs."""
    seen: dict[str, Range] = {}

    def note(name: str, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            seen[name] = Range(low=value.min().item(), high=value.max().item())

    names = [node.name for node in program.graph.nodes if node.op == "placeholder"][-len(inputs) :]
    given = dict(zip(names, inputs, strict=True))
    evaluate(program, given, lambda node, value: note(node.name, value))
    for name, value in given.items():
        note(name, value)
    known, calls = sites(program), {node.name: node for node in program.graph.nodes}
    found = {}
    for key in keys:
        node = calls[known[key].node]
        source = node.args[0]
        ranges = {"input": seen[source.name], "output": seen[tail(node).name]}  # type: ignore[union-attr]
        found[key] = OpPlan.model_validate({"op": known[key].kind, "precision": precision, **ranges})
    return found


def _artifact(
    backend: str, program: ExportedProgram, ops: Mapping[str, OpPlan], folder: Path, inputs: Sequence[Tensor]
) -> Callable[[], object]:
    on, plan = get_backend(backend), ComponentPlan(float_precision="fp32", ops=dict(ops))
    shaped, _ = Pipeline(tuple(shape_preset(backend))).run(settled(program, plan) if ops else program)
    placed = resolve(shaped, plan, program) if ops else {}
    if placed:
        shaped = (quantized if (on.quantizes or "graph") == "graph" else on_grid)(shaped, placed)
    request = replace(request_of(shaped, folder), quantized=placed)
    lowered = on.lower(shaped, request)
    run = on.load(folder / lowered.file, request.inputs, request.outputs)
    given = {spec.name: value.numpy() for spec, value in zip(request.inputs, inputs, strict=True)}
    return lambda: run(given)


def fitted(rows: Sequence[Timed], macs: float | None = None) -> tuple[float, float, float]:
    """Seconds for each multiply-accumulate, value and call; `macs`: where the first is known."""
    facts = np.array([[row.macs, row.values, 1.0] for row in rows])
    seconds = np.array([row.seconds for row in rows])
    left = np.ones(len(rows))
    if macs is not None:
        left -= macs * facts[:, 0] / seconds
        facts[:, 0] = 0.0
    scale = np.maximum(facts.max(0), 1e-300)
    found, _ = nnls(facts / scale / seconds[:, None], left)
    values = found / scale
    return float(values[0] if macs is None else macs), float(values[1]), float(values[2])


def _worst(rows: Sequence[Timed], fit: tuple[float, float, float]) -> float:
    return max(abs(math.log((fit[0] * one.macs + fit[1] * one.values + fit[2]) / one.seconds)) for one in rows)


def _markdown(settings: Mapping[str, str], rows: Sequence[Timed]) -> str:
    lines = ["# What an op costs in each precision, by its shape", "", __doc__.strip().split("\n\n")[2], ""]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    lines += [
        "",
        "## Fitted",
        "",
        "Freely, and with the time that the target file has, which is a large network's.",
        "",
    ]
    lines += ["| backend | op | precision | time | values | call | worst error | time | values | call | worst error |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    for backend, op in dict.fromkeys((row.backend, row.op) for row in rows):
        own = [row for row in rows if (row.backend, row.op) == (backend, op)]
        plain = fitted([row for row in own if row.precision == "fp32"])[0]
        for precision in dict.fromkeys(row.precision for row in own):
            these = [row for row in own if row.precision == precision]
            cost = load_target(TARGET).backend(backend).cost(op, precision)  # type: ignore[arg-type]
            known = plain * (1.0 if cost is None else cost.time)
            cells = ""
            for fit in (fitted(these), fitted(these, known)):
                numbers = f"{fit[0] / plain:.3f} | {fit[1] / plain:.0f} | {fit[2] / plain:.0f}"
                cells += f" {numbers} | {math.expm1(_worst(these, fit)):.0%} |"
            lines.append(f"| {backend} | {op} | {precision} |{cells}")
    lines += [
        "",
        "## Measured",
        "",
        "| backend | op | shape | precision | us an op | to fp32 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = next(one for one in rows if one.precision == "fp32" and _same(one, row))
        shape = "x".join(map(str, row.shape))
        ratio = row.seconds / base.seconds
        lines.append(
            f"| {row.backend} | {row.op} | {shape} | {row.precision} | {row.seconds * 1e6:.1f} | {ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _same(a: Timed, b: Timed) -> bool:
    return (a.backend, a.op, a.shape) == (b.backend, b.op, b.shape)


if __name__ == "__main__":
    main()
