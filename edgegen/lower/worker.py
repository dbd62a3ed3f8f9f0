"""Lowering in a child process: a converter that crashes, hangs or eats the memory takes only itself down."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from edgegen.child import child_main, environment, leave, run_child
from edgegen.errors import EdgegenError
from edgegen.graph.export_lock import EXPORT_LOCK
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Lowered, LowerRequest, Precision
from edgegen.lower.mapped_weights import Place, with_weights, without_weights
from edgegen.nursery import Home, is_possible
from edgegen.precision.plan import OpPlan

if TYPE_CHECKING:
    from torch.export import ExportedProgram


PRELOADED: Mapping[str, tuple[str, ...]] = {
    "coreai": ("coreai_torch", "edgegen.lower.coreai"),
    "coreml": ("coremltools", "edgegen.lower.coreml"),
    "executorch": (
        "executorch.exir",
        "executorch.backends.xnnpack.partition.xnnpack_partitioner",
        "executorch.runtime",
        "edgegen.lower.executorch",
    ),
    "onnx": ("onnx", "onnxscript", "torch.onnx", "onnxruntime", "edgegen.lower.onnx"),
    "tflite": ("litert_torch", "ai_edge_litert.interpreter", "ai_edge_quantizer", "edgegen.lower.tflite"),
}
"""Backend -> what its conversions import, beside this module: seconds, each time anew."""


def open_home(backend: str) -> Home | None:
    """A process that forks for each lowering by `backend`; None where this host cannot have one."""
    if not is_possible():
        return None
    return Home(("torch", "torch.export", "edgegen.lower.worker", *PRELOADED[backend]), environment())


class LowerInChild(BaseModel):
    """What the child is told; `module` exposes the backend as `BACKEND`, `program` is a `.pt2` of our own making."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    program: str
    weights: dict[str, Place]
    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Precision
    out_dir: str
    options: dict[str, str]
    islands: tuple[str, ...]
    quantized: dict[str, OpPlan]


def lower_in_child(
    backend: str,
    program: ExportedProgram,
    request: LowerRequest,
    log: Path,
    timeout_s: float | None = None,
    memory_limit_bytes: int | None = None,
    *,
    module: str | None = None,
    home: Home | None = None,
) -> Lowered:
    """Lower `program` with `backend` in a child process; the artifact appears in `request.out_dir`.

    `log` receives what the child prints and is kept, on success too. `timeout_s` is wall time. `memory_limit_bytes`
    bounds the child's data segment (Linux: private writable memory). `module` names a module that exposes another
    `BACKEND`; `home` is forked for it. EdgegenError (or the class that the backend raised) names backend, component,
    cause and log.
    """
    name = f"backend `{backend}` on component `{request.component}`"
    try:
        request.out_dir.mkdir(parents=True, exist_ok=True)
        # Inside out_dir: on the disk that must hold the artifact anyway, and swept with it when this process is killed.
        private = Path(tempfile.mkdtemp(prefix=".edgegen-lower-", dir=request.out_dir)).resolve()
    except OSError as error:
        raise EdgegenError(f"{name}: `{request.out_dir}` cannot be written: {error.strerror}") from error
    try:
        graph = private / "program.pt2"
        weights = _save(program, graph, name)
        job = LowerInChild(
            module=module or f"edgegen.lower.{backend}",
            program=str(graph),
            weights=weights,
            component=request.component,
            inputs=request.inputs,
            outputs=request.outputs,
            precision=request.precision,
            out_dir=str(request.out_dir.resolve()),
            options=dict(request.options),
            islands=request.islands,
            quantized=dict(request.quantized),
        )
        lowered = run_child(
            "edgegen.lower.worker",
            job,
            Lowered,
            log,
            name,
            timeout_s=timeout_s,
            memory_limit_bytes=memory_limit_bytes,
            parent_folder=private,
            home=home,
        )
    finally:
        shutil.rmtree(private, ignore_errors=True)
    file = PurePosixPath(lowered.file)
    if file.is_absolute() or ".." in file.parts or not file.parts or not (request.out_dir / file).exists():
        raise EdgegenError(
            f"{name} reported success without the artifact `{lowered.file}`; log `{log}`", hint=f"read the log `{log}`"
        )
    return lowered


def _save(program: ExportedProgram, path: Path, name: str) -> dict[str, Place]:
    """Write the graph to `path`, and what weights are in no file yet beside it; says where the weights are."""
    import torch

    try:
        with EXPORT_LOCK, warnings.catch_warnings():
            # A number that stands for a weight has one element of storage, as is meant.
            warnings.filterwarnings("ignore", message="No complete tensor found in the group")
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")  # torch's own, in a copy
            graph, places = without_weights(program, path.with_name("weights.bin"))
            torch.export.save(graph, str(path))
        return places
    except (OSError, RuntimeError) as error:  # torch's zip writer tells a full disk as a RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise EdgegenError(
            f"{name}: the graph cannot be written: {reason}", hint=f"see how full the disk is with `df -h {path}`"
        ) from error


def work(job: LowerInChild) -> Lowered:
    """The child's whole task."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    backend = import_module(job.module).BACKEND
    if job.quantized:
        import torch.ao.quantization.fx._decomposed  # registers the ops that the graph has
    program = torch.export.load(job.program)
    with_weights(program, job.weights)
    request = LowerRequest(
        component=job.component,
        inputs=job.inputs,
        outputs=job.outputs,
        precision=job.precision,
        out_dir=Path(job.out_dir),
        options=job.options,
        islands=job.islands,
        quantized=job.quantized,
    )
    gc.disable()  # converters make and keep many small objects: collecting costs a sixth of the time and frees nothing
    try:
        lowered: Lowered = backend.lower(program, request)
    finally:
        gc.enable()
    return lowered


def main(path: str) -> int:
    """The child's side of `run_child`."""
    return child_main(path, LowerInChild, work)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
