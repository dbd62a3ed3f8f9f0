"""NNCF and OpenVINO from an environment of their own, which this project's cannot share.

Run by the other Python, it quantizes an ONNX file and then serves calls of it, a line each; `Worker` is our end.

    PYTHON nncf_worker.py RECIPE MODEL.onnx CALLS.npz OUT THREADS
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Worker:
    """A process that holds one quantized model; RuntimeError when it fails."""

    def __init__(self, python: Path, recipe: str, model: Path, calls: Path, out: Path, threads: int) -> None:
        command = [str(python), __file__, recipe, str(model), str(calls), str(out), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._folder = out.parent
        self.seconds = float(self._answer()["seconds"])
        """Of quantizing."""

    def run(self, given: Mapping[str, Any]) -> Any:
        """The first output, an array, of tensors by name."""
        self.prepare(given)()
        at = self._folder / "found.npy"
        self._ask(f"save {at}")
        return np.load(at)

    def prepare(self, given: Mapping[str, Any]) -> Callable[[], object]:
        """Hand the inputs over; then one call, a line there and a line back, is one inference."""
        at = self._folder / "given.npz"
        np.savez(at, **{name: value.numpy() for name, value in given.items()})
        self._ask(f"given {at}")
        return lambda: self._ask("run")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if text.startswith("answer "):  # NNCF prints what it does, too
                found: dict[str, Any] = json.loads(text.removeprefix("answer "))
                return found
        raise RuntimeError(f"the NNCF process ended with {self._process.wait()}")


def main() -> None:
    recipe, model, calls, out, threads = sys.argv[1:]
    grouped: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in np.load(calls).items():
        place, _, key = name.partition("/")
        grouped[place][key] = value
    started = time.perf_counter()
    if recipe == "onnx":
        import nncf
        import onnx

        data = nncf.Dataset(list(grouped.values()))
        onnx.save(nncf.quantize(onnx.load(_folded(model, Path(out))), data), out)
        _answer(seconds=time.perf_counter() - started)
        return
    import openvino

    read = openvino.Core().read_model(model)
    if recipe == "openvino":
        import nncf

        data = nncf.Dataset(list(grouped.values()))
        # What NNCF's own guide says to ask for with attention in the model.
        preset = nncf.QuantizationPreset.MIXED
        read = nncf.quantize(read, data, preset=preset, model_type=nncf.ModelType.TRANSFORMER)
    seconds = time.perf_counter() - started
    openvino.save_model(read, out, compress_to_fp16=False)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    call = openvino.Core().compile_model(out, "CPU", settings)
    _answer(seconds=seconds)
    given: Any = None
    found: Any = None
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "given":
            given = dict(np.load(rest))
        elif word == "run":
            found = call(given)
        else:
            np.save(rest, next(iter(found.values())))
        _answer()


def _folded(model: str, out: Path) -> str:
    """`model` after onnxruntime's basic optimisations: NNCF fails on products of two constants, as a time's are."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out.with_suffix(".folded.onnx"))
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return options.optimized_model_filepath


def _answer(**said: float) -> None:
    print("answer " + json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
