"""What each rewrite changes in the artifact: ops, delegated pieces, bytes, latency, lowering time, numbers.

    python tools/bench_rewrites.py --model S64 --backend executorch --markdown table.md --json table.json

For every model and backend: how long the converter's own call takes; the plain export through the backend; then the
canonical passes and the backend's preset, one more pass a row (`--whole`: all of them in one row). Each is executed
and held against the network in torch fp32. Latency is measured in turns with the plain artifact, a call of the one and
then one of the other, and given as the ratio of the medians, so a machine that is busy for a while slows down both.
Lowering runs in this process, after a warm-up that pays for imports, with the cycle collector off as in a build.

Models: S64, a UNet of 12.9 M parameters at a 32x32 latent, and R, one of 315.7 M shaped as SDXS-512's, both with
random weights, those of norms too (fresh ones are all ones, which converters drop; `--fresh-norms` leaves them so);
`shapes`, the three trained components of the demo student. Core ML packages are computed by `mlprogram`, which says
what they give, not how fast. `--precision fp16` casts last, and makes the graph safe for it first, as a build does.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from subjects import BIG, SMALL
from torch import Tensor, nn
from torch.export import ExportedProgram
from turns import WARM_UP, in_turns, keep_to, request_of, settings_of

from edgegen.cores import cores
from edgegen.graph.edit import user_inputs
from edgegen.lower.backend import Array, Backend, Precision, get_backend
from edgegen.rewrite.base import census
from edgegen.rewrite.choose import shape_preset
from edgegen.rewrite.half_safety import make_half_safe
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.presets import canonical
from edgegen.students.load import load
from edgegen.students.networks.unet import UNet
from edgegen.students.shapes import family
from edgegen.verify.metrics import sqnr_db
from mlprogram import Program

MODELS = ("S64", "shapes", "R")
BACKENDS = ("executorch", "tflite", "onnx", "coreml", "coreai")
NOT_HERE = "not timed here"
AS_IT_COMES = "plain, the converter's own call"


class Case(BaseModel, arbitrary_types_allowed=True):
    """One network, inputs of the right shapes, and the timesteps at which a sampler calls it."""

    name: str
    module: nn.Module
    names: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    timesteps: tuple[float, ...] = ()


class Row(BaseModel):
    """One pipeline of one network on one backend. `plain_ms` was measured in turns with `ms`."""

    model: str
    backend: str
    row: str
    graph_ops: int
    artifact_ops: int | None = None
    outside: int | None = None
    """Ops that the delegate does not take."""
    pieces: int | None = None
    megabytes: float | None = None
    ms: float | None = None
    plain_ms: float | None = None
    ratio: float | None = None
    passes_s: float = 0.0
    lowering_s: float | None = None
    lowering_cpu_s: float | None = None
    """CPU seconds of this process: what a machine that is shared does not blur."""
    sqnr_db: float | None = None
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["S64"])
    parser.add_argument("--backend", choices=BACKENDS, nargs="+", default=["executorch"])
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--component", nargs="+", help="of `shapes`, all of them by default")
    parser.add_argument("--fresh-norms", action="store_true", help="norms of S64 and R scale by one and shift by none")
    parser.add_argument("--whole", action="store_true", help="the plain and the full pipeline alone")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=40, help="calls of each artifact that count")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    _limit_threads(options.threads)
    settings = _settings(options)
    print("\n".join(f"{name}: {value}" for name, value in settings.items()), file=sys.stderr, flush=True)
    rows: list[Row] = []
    for model in options.model:
        for case in _cases(model, options.component, options.fresh_norms):
            for backend in map(get_backend, options.backend):
                for row in _measure(case, backend, options.precision, options.whole, options.repeats):
                    rows.append(row)
                    print(_line(row), flush=True)
    if options.json:
        text = json.dumps({"settings": settings, "rows": [row.model_dump() for row in rows]}, indent=2)
        options.json.write_text(text + "\n")
    if options.markdown:
        options.markdown.write_text(_markdown(settings, rows))


def _limit_threads(count: int) -> None:
    """Of torch and, through the CPUs that this process may use and its environment, of the runtimes."""
    keep_to(count)
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def _settings(options: argparse.Namespace) -> dict[str, str]:
    repeats = f"{options.repeats} calls in turns with the plain artifact, medians, after {WARM_UP} that do not count"
    return settings_of(options.backend, options.threads, precision=options.precision, repeats=repeats)


def _cases(model: str, components: Sequence[str] | None, fresh_norms: bool) -> Iterator[Case]:
    if model == "shapes":
        student = load(family.WEIGHTS)
        for name, part in student.components.items():
            if components and name not in components:
                continue
            names = tuple(spec.name for spec in part.inputs)
            times = student.config.sampler.timesteps() if "timestep" in names else ()
            given = dict(zip(names, part.example_inputs(), strict=True))
            if times:
                given["timestep"] = torch.tensor([times[0]])
            module = part.module.eval()
            yield Case(name=f"shapes {name}", module=module, names=names, inputs=tuple(given.values()), timesteps=times)
        return
    config = SMALL if model == "S64" else BIG
    torch.manual_seed(0)
    module = UNet(config).eval()
    for part in module.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm) and not fresh_norms:
            nn.init.normal_(part.weight, 1.0, 0.2)
            nn.init.normal_(part.bias, 0.0, 0.1)
    latent = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
    context = torch.randn(1, 77, config.cross_attention_dim)
    inputs = (latent, torch.tensor([999.0]), context)
    yield Case(name=model, module=module, names=("latent", "timestep", "context"), inputs=inputs, timesteps=(999.0,))


def _measure(case: Case, backend: Backend, precision: Precision, whole: bool, repeats: int) -> Iterator[Row]:
    with torch.no_grad():
        expected = case.module(*case.inputs).numpy()
        program = torch.export.export(case.module, case.inputs)
    given = {name: value.numpy() for name, value in zip(case.names, case.inputs, strict=True)}
    given["step"] = np.zeros(1, np.int32)
    passes = (*canonical.passes(case.timesteps), *shape_preset(backend.name))
    with tempfile.TemporaryDirectory(prefix="bench-rewrites-") as folder:
        _warm_up(backend, Path(folder))
        if backend.name in _AS_THEY_COME:
            yield _as_it_comes(case, backend, program)
        plain: Callable[[], Array] | None = None
        seconds = 0.0
        for place in range(len(passes) + 1):
            if place:
                program, (record,) = Pipeline(passes[place - 1 : place]).run(program)
                if not whole and not record.modified:
                    continue
                seconds = record.seconds + (seconds if whole else 0.0)
            if whole and 0 < place < len(passes):
                continue
            name = "plain" if not place else f"+ {passes[place - 1]}"
            if whole and place:
                name = "canonical + preset"
            row = Row(model=case.name, backend=backend.name, row=name, graph_ops=census(program).total())
            row.passes_s = round(seconds, 3)
            run = _lower(program, backend, precision, row, Path(folder) / str(place), given)
            row.sqnr_db = round(sqnr_db(expected, run()), 1)
            if row.note:
                yield row
                continue
            plain = plain or run
            _time(row, run, plain, repeats)
            yield row


def _executorch(case: Case, program: ExportedProgram) -> object:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()


def _tflite(case: Case, program: ExportedProgram) -> object:
    return importlib.import_module("litert_torch").convert(case.module, case.inputs)


_AS_THEY_COME = {
    "executorch": _executorch,
    "tflite": _tflite,
    "onnx": lambda case, program: torch.onnx.export(program, (), dynamo=True),
}
"""What one would write without a compiler: the converter's own call on the plain network."""


def _as_it_comes(case: Case, backend: Backend, program: ExportedProgram) -> Row:
    row = Row(model=case.name, backend=backend.name, row=AS_IT_COMES, graph_ops=census(program).total())
    gc.collect()
    started, used = time.perf_counter(), time.process_time()
    _AS_THEY_COME[backend.name](case, program)
    row.lowering_s = round(time.perf_counter() - started, 2)
    row.lowering_cpu_s = round(time.process_time() - used, 2)
    return row


def _lower(
    program: ExportedProgram,
    backend: Backend,
    precision: Precision,
    row: Row,
    folder: Path,
    given: dict[str, Array],
) -> Callable[[], Array]:
    """Lower, fill in what the artifact says of itself, and give a call of it."""
    folder.mkdir()
    islands: tuple[str, ...] = ()
    if precision == "fp16" and backend.half != "storage":
        sample = {node.name: torch.from_numpy(given[node.name]) for node in user_inputs(program)}
        safe = make_half_safe(program, [sample])
        graph_half = backend.half == "graph"
        program, islands = (safe.half, ()) if graph_half else (safe.safe, safe.to_half.islands)
    request = replace(request_of(program, folder), precision=precision, islands=islands)
    gc.collect()
    gc.disable()
    started, used = time.perf_counter(), time.process_time()
    try:
        lowered = backend.lower(program, request)
    finally:
        gc.enable()
    row.lowering_s = round(time.perf_counter() - started, 2)
    row.lowering_cpu_s = round(time.process_time() - used, 2)
    path = folder / lowered.file
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    row.megabytes = round(sum(one.stat().st_size for one in files) / 1e6, 2)
    row.artifact_ops = lowered.delegation.total_ops
    if lowered.delegation.known:
        row.pieces = lowered.delegation.pieces
        row.outside = sum(lowered.delegation.undelegated.values())
    feed = {spec.name: given[spec.name] for spec in request.inputs}
    output = request.outputs[0].name
    if backend.not_executed_here() is not None:
        row.note = NOT_HERE
        package = Program.open(path)
        return lambda: package(feed)[output]
    executable = backend.load(path, request.inputs, request.outputs)
    return lambda: executable(feed)[output]


def _warm_up(backend: Backend, folder: Path) -> None:
    """Lower one convolution, so that no row pays for imports."""
    (folder / "warm-up").mkdir()
    with torch.no_grad():
        tiny = torch.export.export(nn.Conv2d(2, 2, 3).eval(), (torch.randn(1, 2, 8, 8),))
    backend.lower(tiny, request_of(tiny, folder / "warm-up"))


def _time(row: Row, run: Callable[[], Array], plain: Callable[[], Array], repeats: int) -> None:
    first, second = in_turns((plain, run), repeats)
    row.plain_ms, row.ms = round(first * 1e3, 3), round(second * 1e3, 3)
    row.ratio = 1.0 if run is plain else round(second / first, 3)


_COLUMNS = {
    "graph_ops": "graph ops",
    "artifact_ops": "artifact ops",
    "outside": "not delegated",
    "pieces": "pieces",
    "megabytes": "MB",
    "ms": "ms",
    "ratio": "to plain",
    "passes_s": "pass s",
    "lowering_s": "lowering s",
    "lowering_cpu_s": "CPU s",
    "sqnr_db": "SQNR dB",
}


def _cells(row: Row) -> list[str]:
    values = row.model_dump()
    return [
        row.note if name == "ms" and row.note else "-" if values[name] is None else str(values[name])
        for name in _COLUMNS
    ]


def _line(row: Row) -> str:
    said = ", ".join(f"{title} {cell}" for title, cell in zip(_COLUMNS.values(), _cells(row), strict=True))
    return f"{row.model} on {row.backend}, {row.row}: {said}"


def _markdown(settings: dict[str, str], rows: list[Row]) -> str:
    lines = [f"- {name}: {value}" for name, value in settings.items()]
    for model, backend in dict.fromkeys((row.model, row.backend) for row in rows):
        lines += ["", f"## {model} on {backend}", "", "| pipeline | " + " | ".join(_COLUMNS.values()) + " |"]
        lines.append("|---|" + "---:|" * len(_COLUMNS))
        for row in rows:
            if (row.model, row.backend) == (model, backend):
                lines.append(f"| `{row.row}` | " + " | ".join(_cells(row)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
