"""Our plans beside each runtime's own quantizer: bytes, likeness to the float network, latency, in one run.

    python tools/bench_int8.py --model shapes S64 --backend tflite executorch --markdown table.md --json table.json

For every network and backend: our fp32 artifact, our plans (`int8`: all convolutions and linears static; `mixed`:
linears with ranges taken in each call; `dynamic`: all of them so, where the runtime can), and what the runtime's own
tools make of the plain export with the settings that they come with. All see the same calibration inputs and are
judged on others: SQNR in dB against the network in torch fp32, and of ours also against the fake-quant graph that they
realise. Artifacts of one network and backend are called in turns, so a machine that is busy for a while slows all of
them down; latency is the median, `to fp32` the ratio of it to our fp32 artifact's in the same turns. Quantizing and
lowering run in this process.

Models: `shapes`, the denoiser and the decoder of the demo student, on its own trajectory; S64, a UNet of 12.9 M
parameters at a 32x32 latent, and R, one of 315.7 M shaped as SDXS-512's, both with random weights, on random inputs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.export import ExportedProgram
from turns import WARM_UP, in_turns, request_of, settings_of

from edgegen.errors import EdgegenError
from edgegen.graph.edit import user_inputs
from edgegen.graph.evaluate import evaluate
from edgegen.lower.backend import Array, LowerRequest, get_backend
from edgegen.lower.pointwise_rows import pointwise_rows
from edgegen.precision.plan import OpPlan, OpPrecision, Range
from edgegen.precision.quantize import quantized, tail
from edgegen.precision.sites import Site, sites
from edgegen.rewrite.choose import shape_preset
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.presets import canonical
from edgegen.students.load import load
from edgegen.students.networks.unet import UNet, UNetConfig
from edgegen.students.shapes import family
from edgegen.verify.metrics import sqnr_db
from edgegen.verify.reference import reference

Inputs = Mapping[str, Tensor]
Plan = Mapping[str, OpPrecision]
"""Kind of op -> its precision; a kind that is not there stays fp32."""
PLANS: dict[str, Plan] = {
    "int8": {"conv": "w8a8", "linear": "w8a8"},
    "mixed": {"conv": "w8a8", "linear": "w8a8-dynamic"},
    "dynamic": {"conv": "w8a8-dynamic", "linear": "w8a8-dynamic"},
}


@dataclass(frozen=True)
class Case:
    """One network; `calibration` is what ranges are observed on, `held_out` what results are judged on."""

    name: str
    module: nn.Module
    calibration: Sequence[Inputs]
    held_out: Sequence[Inputs]
    timesteps: tuple[float, ...] = ()

    @property
    def example(self) -> tuple[Tensor, ...]:
        return tuple(self.held_out[0].values())


@dataclass(frozen=True)
class Made:
    """One artifact: how it is called, and the graph that it realises where that is known."""

    row: str
    path: Path
    run: Callable[[Inputs], Array]
    seconds: float
    int8: str = ""
    realises: ExportedProgram | None = None


@dataclass(frozen=True)
class Failed:
    """An artifact that could not be made or run."""

    row: str
    why: str


class Row(BaseModel):
    """One artifact of one network on one backend; `to_fp32` and `ms` were measured in turns with the others."""

    model: str
    backend: str
    row: str
    megabytes: float | None = None
    ms: float | None = None
    to_fp32: float | None = None
    sqnr_db: float | None = None
    """Against the network in torch fp32, over all held-out inputs together."""
    to_reference_db: float | None = None
    """Against the fake-quant graph that the artifact realises."""
    made_s: float | None = None
    int8: str = ""
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("shapes", "S64", "R"), nargs="+", default=["shapes"])
    parser.add_argument("--component", nargs="+", default=["denoiser", "decoder"], help="of `shapes`")
    parser.add_argument("--backend", choices=sorted(BACKENDS), nargs="+", default=["tflite"])
    parser.add_argument("--plan", choices=sorted(PLANS), nargs="+", default=list(PLANS))
    parser.add_argument("--no-defaults", action="store_true", help="leave the runtimes' own recipes out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=40, help="calls of each artifact that count")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    settings = _settings(options)
    print("\n".join(f"{name}: {value}" for name, value in settings.items()), file=sys.stderr, flush=True)
    rows: list[Row] = []
    for case in (one for model in options.model for one in _cases(model, options.component)):
        for name in options.backend:
            for row in _measure(case, name, options):
                rows.append(row)
                print(_line(row), flush=True)
    if options.json:
        found = {"settings": settings, "rows": [row.model_dump() for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(_markdown(settings, rows))


def _settings(options: argparse.Namespace) -> dict[str, str]:
    theirs = ", ".join(f"{name} {metadata.version(name)}" for name in ("ai-edge-quantizer", "torchao"))
    repeats = f"{options.repeats} calls of each artifact in turns, medians, after {WARM_UP} that do not count"
    return settings_of(options.backend, options.threads, repeats=repeats, quantizers=theirs)


def _cases(model: str, components: Sequence[str]) -> Iterator[Case]:
    if model == "shapes":
        student = load(family.WEIGHTS)
        drawn = reference(student, prompts=student.config.example_prompts[:4], seed=7, step_counts=(4,))
        assert student.config.sampler is not None
        for name in components:
            part = student.components[name]
            calls = [{key: torch.from_numpy(v) for key, v in one.inputs.items()} for one in drawn.samples[name]]
            first = len(calls) // 4  # those of the first prompt
            times = student.config.sampler.timesteps() if "timestep" in calls[0] else ()
            yield Case(f"shapes {name}", part.module.eval(), calls[first:], calls[:first], times)
        return
    small = UNetConfig(sample_size=32, block_out_channels=(64, 128, 256), num_heads=8, cross_attention_dim=256)
    config = small if model == "S64" else UNetConfig(sample_size=64)
    torch.manual_seed(0)
    module = UNet(config).eval()
    calls = []
    for _ in range(4):
        latent = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
        context = torch.randn(1, 77, config.cross_attention_dim)
        calls.append({"latent": latent, "timestep": torch.tensor([999.0]), "context": context})
    yield Case(model, module, calls[1:], calls[:1], (999.0,))


def _measure(case: Case, name: str, options: argparse.Namespace) -> Iterator[Row]:
    with torch.no_grad():
        expected = [case.module(*one.values()).numpy() for one in case.held_out]
    with tempfile.TemporaryDirectory(prefix="bench-int8-") as folder:
        made: list[tuple[Row, Made]] = []
        for one in BACKENDS[name](case, Path(folder), options.plan, not options.no_defaults):
            row = Row(model=case.name, backend=name, row=one.row)
            if isinstance(one, Failed):
                row.note = one.why
                yield row
                continue
            found = [one.run(given) for given in case.held_out]
            row.sqnr_db = round(sqnr_db(_joined(expected), _joined(found)), 1)
            if one.realises is not None:
                realised = pointwise_rows(one.realises)
                own = [evaluate(realised, _as_rewritten(given, case))[0].numpy() for given in case.held_out]
                row.to_reference_db = round(sqnr_db(_joined(own), _joined(found)), 1)
            row.megabytes, row.made_s = round(one.path.stat().st_size / 1e6, 2), round(one.seconds, 1)
            row.int8 = one.int8
            made.append((row, one))
        _time(made, case.held_out[0], options.repeats)
        yield from (row for row, _ in made)


def _joined(arrays: Sequence[Array]) -> Array:
    return torch.stack([torch.from_numpy(one) for one in arrays]).numpy()


def _as_rewritten(given: Inputs, case: Case) -> dict[str, Tensor]:
    """With the step that a graph of several timesteps is called by, which the passes put in the time's place."""
    if not case.timesteps:
        return dict(given)
    nearest = min(range(len(case.timesteps)), key=lambda i: abs(case.timesteps[i] - float(given["timestep"])))
    return {**given, "step": torch.tensor([nearest], dtype=torch.int32)}


def _time(made: Sequence[tuple[Row, Made]], given: Inputs, repeats: int) -> None:
    medians = in_turns([partial(one.run, given) for _, one in made], repeats)
    for (row, _), seconds in zip(made, medians, strict=True):
        row.ms, row.to_fp32 = round(seconds * 1e3, 2), round(seconds / medians[0], 3)


# Ours


@dataclass(frozen=True)
class Ours:
    """The graph that a backend lowers, and what its ops were seen to take and give."""

    case: Case
    backend: str
    program: ExportedProgram
    sites: Mapping[str, Site]
    ranges: Mapping[str, Range] = field(default_factory=dict)

    @staticmethod
    def of(case: Case, backend: str) -> Ours:
        with torch.no_grad():
            plain = torch.export.export(case.module, case.example)
        program, _ = Pipeline((*canonical.passes(case.timesteps), *shape_preset(backend))).run(plain)
        ours = Ours(case, backend, program, sites(program))
        return replace(ours, ranges=ours._observed())

    def plan(self, kinds: Plan) -> dict[str, OpPlan]:
        """Ranges are least and greatest values: what a planner does better is not in this table."""
        nodes = {node.name: node for node in self.program.graph.nodes}
        ops = {}
        for site in self.sites.values():
            precision, node = kinds.get(site.kind, "fp32"), nodes[site.node]
            if precision == "w8a8":
                given, made = self.ranges[node.all_input_nodes[0].name], self.ranges[tail(node).name]
                ops[site.node] = OpPlan(op=site.kind, precision=precision, input=given, output=made)
            elif precision != "fp32":
                ops[site.node] = OpPlan(op=site.kind, precision=precision)
        return ops

    def lower(self, folder: Path, row: str, ops: Mapping[str, OpPlan]) -> Made | Failed:
        backend = get_backend(self.backend)
        folder = folder / row
        folder.mkdir()
        realises = quantized(self.program, ops) if ops else self.program
        program = realises if backend.quantizes == "graph" else self.program
        request = replace(request_of(program, folder), quantized=ops)
        started = time.perf_counter()
        try:
            lowered = backend.lower(program, request)
            seconds = time.perf_counter() - started
            run = _runner(self.case, self.backend, folder / lowered.file, request)
            run(self.case.held_out[0])
        except EdgegenError as error:
            return Failed(row, error.message.splitlines()[0])
        return Made(row, folder / lowered.file, run, seconds, lowered.details.get("int8_ops", ""), realises)

    def rows(self, folder: Path, plans: Sequence[str]) -> Iterator[Made | Failed]:
        yield self.lower(folder, "fp32", {})
        for name in plans:
            kinds = dict(PLANS[name])
            if self.backend in ("executorch", "onnx") and name == "dynamic":
                # XNNPACK has none that is right where one follows another, onnxruntime's is slower than float.
                kinds["conv"] = "fp32"
            yield self.lower(folder, name, self.plan(kinds))

    def _observed(self) -> dict[str, Range]:
        nodes = {node.name: node for node in self.program.graph.nodes}
        wanted = {tail(nodes[site.node]).name for site in self.sites.values()}
        wanted |= {one.name for site in self.sites.values() for one in nodes[site.node].all_input_nodes[:1]}
        ends: dict[str, tuple[float, float]] = {}

        def see(name: str, value: Tensor) -> None:
            low, high = ends.get(name, (float("inf"), float("-inf")))
            ends[name] = min(low, float(value.min())), max(high, float(value.max()))

        for given in self.case.calibration:
            inputs = _as_rewritten(given, self.case)
            for node in user_inputs(self.program):
                if node.name in wanted:
                    see(node.name, inputs[node.name])
            evaluate(self.program, inputs, lambda node, value: see(node.name, value) if node.name in wanted else None)
        return {name: Range(low=low, high=high) for name, (low, high) in ends.items()}


def _runner(case: Case, backend: str, path: Path, request: LowerRequest) -> Callable[[Inputs], Array]:
    executable = get_backend(backend).load(path, request.inputs, request.outputs)

    def run(given: Inputs) -> Array:
        inputs = _as_rewritten(given, case)
        return executable({spec.name: inputs[spec.name].numpy() for spec in request.inputs})["output_0"]

    return run


# Theirs: a backend is one function, which yields our rows and then those of the runtime's own tools.


def _tflite(case: Case, folder: Path, plans: Sequence[str], defaults: bool) -> Iterator[Made | Failed]:
    from ai_edge_quantizer import quantizer, recipe

    yield from Ours.of(case, "tflite").rows(folder, plans)
    if not defaults:
        return
    with torch.no_grad():
        plain = torch.export.export(case.module, case.example)
    request = request_of(plain, folder)
    lowered = get_backend("tflite").lower(plain, request)
    content = (folder / lowered.file).read_bytes()
    calls = [{spec.name: one[spec.name].numpy() for spec in request.inputs} for one in case.calibration]
    for name, presets in (("dynamic", recipe.dynamic_wi8_afp32()), ("static", recipe.static_wi8_ai8())):
        row = f"ai-edge-quantizer, {name} preset"
        started = time.perf_counter()
        try:
            maker = quantizer.Quantizer(content, presets)
            ranges = maker.calibrate({"serving_default": calls}) if maker.need_calibration else None
            made = maker.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
            seconds = time.perf_counter() - started
            path = folder / f"aeq-{name}.tflite"
            path.write_bytes(bytes(made.quantized_model))
            run = _interpreted(path)
            run(case.held_out[0])
        except Exception as error:
            yield Failed(row, f"fails: {str(error).splitlines()[0]}")
            continue
        yield Made(row, path, run, seconds)


def _interpreted(path: Path) -> Callable[[Inputs], Array]:
    """A call of a TFLite file whose inputs and outputs may be int8 themselves, as the static preset has them."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
    runner = interpreter.get_signature_runner("serving_default")

    def run(given: Inputs) -> Array:
        feed = {}
        for name, tensor in runner.get_input_details().items():
            scale, zero = tensor["quantization"]
            value = given[name].numpy()
            whole = np.clip(np.rint(value / (scale or 1.0)) + zero, -128, 127)
            feed[name] = whole.astype(np.int8) if tensor["dtype"] is np.int8 else value
        (found,), (made,) = runner(**feed).values(), runner.get_output_details().values()
        scale, zero = made["quantization"]
        return np.asarray((found.astype(np.float32) - zero) * scale if found.dtype == np.int8 else found)

    return run


def _executorch(case: Case, folder: Path, plans: Sequence[str], defaults: bool) -> Iterator[Made | Failed]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    yield from Ours.of(case, "executorch").rows(folder, plans)
    if not defaults:
        return
    for name, dynamic in (("static", False), ("dynamic", True)):
        row = f"XNNPACKQuantizer, {name}"
        started = time.perf_counter()
        try:
            config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
            with torch.no_grad():
                plain = torch.export.export(case.module, case.example)
                prepared = prepare_pt2e(plain.module(), XNNPACKQuantizer().set_global(config))
                for given in case.calibration:
                    prepared(*given.values())
                program = torch.export.export(convert_pt2e(prepared), case.example)
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path = folder / f"xnnpack-{name}.pte"
            path.write_bytes(edge.to_executorch().buffer)
            seconds = time.perf_counter() - started
            run = _runner(case, "executorch", path, request_of(plain, folder))
            run(case.held_out[0])
        except Exception as error:
            yield Failed(row, f"fails: {str(error).splitlines()[0][:120]}")
            continue
        yield Made(row, path, run, seconds)


def _onnx(case: Case, folder: Path, plans: Sequence[str], defaults: bool) -> Iterator[Made | Failed]:
    import onnx
    from onnxruntime import quantization as ort

    yield from Ours.of(case, "onnx").rows(folder, plans)
    if not defaults:
        return
    with torch.no_grad():
        plain = torch.export.export(case.module, case.example)
    request = request_of(plain, folder)
    lowered = get_backend("onnx").lower(plain, request)
    calls = [{spec.name: one[spec.name].numpy() for spec in request.inputs} for one in case.calibration]

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.calls = iter(calls)

        def get_next(self) -> dict[str, Array] | None:
            return next(self.calls, None)

    def static(**settings: object) -> Callable[[Path], None]:
        return lambda path: ort.quantize_static(str(folder / lowered.file), str(path), Reader(), **settings)

    def nncf(path: Path) -> None:
        tool = importlib.import_module("nncf")
        onnx.save(tool.quantize(onnx.load(str(folder / lowered.file)), tool.Dataset(calls)), str(path))

    products = {"op_types_to_quantize": ["Conv", "MatMul", "Gemm"], "per_channel": True}
    for place, (row, make) in enumerate(
        {
            "quantize_static": static(),
            "quantize_static, products per channel": static(**products),
            "NNCF": nncf,
        }.items()
    ):
        path = folder / f"theirs-{place}.onnx"
        started = time.perf_counter()
        try:
            make(path)
            seconds = time.perf_counter() - started
            run = _runner(case, "onnx", path, request)
            run(case.held_out[0])
        except Exception as error:
            yield Failed(row, f"fails: {str(error).splitlines()[0][:120]}")
            continue
        yield Made(row, path, run, seconds)


BACKENDS: dict[str, Callable[[Case, Path, Sequence[str], bool], Iterator[Made | Failed]]] = {
    "tflite": _tflite,
    "executorch": _executorch,
    "onnx": _onnx,
}

_COLUMNS = {
    "megabytes": "MB",
    "ms": "ms",
    "to_fp32": "to fp32",
    "sqnr_db": "SQNR dB",
    "to_reference_db": "to fake-quant dB",
    "made_s": "made in s",
    "int8": "int8 ops",
    "note": "note",
}


def _cells(row: Row) -> list[str]:
    values = row.model_dump()
    return ["-" if values[name] is None else str(values[name]) for name in _COLUMNS]


def _line(row: Row) -> str:
    said = ", ".join(f"{title} {cell}" for title, cell in zip(_COLUMNS.values(), _cells(row), strict=True) if cell)
    return f"{row.model} on {row.backend}, {row.row}: {said}"


def _markdown(settings: dict[str, str], rows: list[Row]) -> str:
    lines = [f"- {name}: {value}" for name, value in settings.items()]
    for model, backend in dict.fromkeys((row.model, row.backend) for row in rows):
        lines += ["", f"## {model} on {backend}", "", "| artifact | " + " | ".join(_COLUMNS.values()) + " |"]
        lines.append("|---|" + "---:|" * (len(_COLUMNS) - 2) + "---|---|")
        for row in rows:
            if (row.model, row.backend) == (model, backend):
                lines.append(f"| {row.row} | " + " | ".join(_cells(row)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
