"""The int8 benchmarks' other rows: what each runtime's own quantizer makes of the plain export with the settings that
it comes with. Every one sees the network's calibration inputs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from int8_apple import coreai, coreml
from int8_ours import Ours
from int8_rows import Failed, Made, first_line, runner
from nncf_worker import Worker
from subjects import Inputs

from edgegen.lower.backend import Array

NOT_INSTALLED = "not measured: NNCF not installed (`--nncf-python PATH`)"


def tflite(ours: Ours, folder: Path) -> Iterator[Made | Failed]:
    """ai-edge-quantizer's presets."""
    from ai_edge_quantizer import quantizer, recipe

    _, path = ours.plain
    content = path.read_bytes()
    calls = _calls(ours)
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
            run(ours.subject.held_out[0])
        except Exception as error:
            yield Failed(row, f"fails: {first_line(error)}")
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


def executorch(ours: Ours, folder: Path) -> Iterator[Made | Failed]:
    """XNNPACKQuantizer through pt2e."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    subject = ours.subject
    for name, dynamic in (("static", False), ("dynamic", True)):
        row = f"XNNPACKQuantizer, {name}"
        started = time.perf_counter()
        try:
            config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
            with torch.no_grad():
                plain = torch.export.export(subject.module, subject.example).module()
                prepared = prepare_pt2e(plain, XNNPACKQuantizer().set_global(config))
                for given in subject.calibration:
                    prepared(*given.values())
                program = torch.export.export(convert_pt2e(prepared), subject.example)
            quantizing, started = time.perf_counter() - started, time.perf_counter()
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path = folder / f"xnnpack-{name}.pte"
            path.write_bytes(edge.to_executorch().buffer)
            seconds = time.perf_counter() - started
            run = runner(subject, "executorch", path, ours.plain[0])
            run(subject.held_out[0])
        except Exception as error:
            yield Failed(row, f"fails: {first_line(error)}")
            continue
        yield Made(row, path, run, quantizing, seconds)


def onnx(ours: Ours, folder: Path) -> Iterator[Made | Failed]:
    """onnxruntime's `quantize_static`."""
    from onnxruntime import quantization as ort

    request, plain = ours.plain
    subject = ours.subject
    calls = _calls(ours)

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.calls = iter(calls)

        def get_next(self) -> dict[str, Array] | None:
            return next(self.calls, None)

    products = {"op_types_to_quantize": ["Conv", "MatMul", "Gemm"], "per_channel": True}
    recipes = {"quantize_static": {}, "quantize_static, products per channel": products}
    for place, (row, settings) in enumerate(recipes.items()):
        path = folder / f"theirs-{place}.onnx"
        started = time.perf_counter()
        try:
            ort.quantize_static(str(plain), str(path), Reader(), **settings)
            seconds = time.perf_counter() - started
            run = runner(subject, "onnx", path, request)
            run(subject.held_out[0])
        except Exception as error:
            yield Failed(row, f"fails: {first_line(error)}")
            continue
        yield Made(row, path, run, seconds)


def nncf(ours: Ours, folder: Path, python: Path | None, default: bool) -> Iterator[Made | Failed]:
    """OpenVINO in fp32 and with NNCF's int8; with `default` NNCF's own on our plain ONNX file, run by onnxruntime."""
    if python is None:
        yield Failed("NNCF", NOT_INSTALLED)
        return
    request, plain = ours.plain
    calls = {f"{i}/{name}": value for i, one in enumerate(_calls(ours)) for name, value in one.items()}
    np.savez(folder / "calls.npz", **calls)
    rows = {"onnx": "NNCF, default", "fp32": "OpenVINO, fp32", "openvino": "OpenVINO, NNCF int8"}
    for recipe, row in rows.items():
        if recipe == "onnx" and not default:
            continue
        path = folder / f"nncf-{recipe}{'.onnx' if recipe == 'onnx' else '.xml'}"
        try:
            worker = Worker(python, recipe, plain, folder / "calls.npz", path, torch.get_num_threads())
            if recipe == "onnx":
                worker.close()
                yield Made(row, path, runner(ours.subject, "onnx", path, request), worker.seconds)
            else:
                weights = path.with_suffix(".bin")
                yield Made(row, weights, worker.run, worker.seconds, note="another runtime", prepare=worker.prepare)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            yield Failed(row, f"fails: {first_line(error)}")


def _calls(ours: Ours) -> list[dict[str, Array]]:
    names = [spec.name for spec in ours.plain[0].inputs]
    return [{name: one[name].numpy() for name in names} for one in ours.subject.calibration]


THEIRS: dict[str, Callable[[Ours, Path], Iterator[Made | Failed]]] = {
    "tflite": tflite,
    "executorch": executorch,
    "onnx": onnx,
    "coreml": coreml,
    "coreai": coreai,
}
