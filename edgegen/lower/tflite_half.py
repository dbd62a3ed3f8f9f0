"""The fp16 form of a TFLite file that was made in fp32, in a child process: a cast of its weights, no conversion."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from edgegen.child import child_main, leave, run_child
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Lowered, LowerRequest
from edgegen.nursery import Home


class HalveInChild(BaseModel):
    """`source` is the fp32 file; what comes out is written to `out_dir`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    out_dir: Path


def halve_in_child(source: Path, request: LowerRequest, log: Path, home: Home | None) -> Lowered:
    """As `edgegen.lower.worker.lower_in_child` for fp16, from the fp32 artifact `source` of the same graph."""
    job = HalveInChild(
        source=source,
        component=request.component,
        inputs=request.inputs,
        outputs=request.outputs,
        out_dir=request.out_dir.resolve(),
    )
    name = f"backend `tflite` on component `{request.component}`"
    return run_child("edgegen.lower.tflite_half", job, Lowered, log, name, parent_folder=request.out_dir, home=home)


def work(job: HalveInChild) -> Lowered:
    """The child's whole task."""
    from edgegen.lower.tflite import TfliteBackend

    request = LowerRequest(job.component, job.inputs, job.outputs, "fp16", job.out_dir)
    return TfliteBackend().halve(job.source, request)


def main(path: str) -> int:
    """The child's side of `run_child`."""
    return child_main(path, HalveInChild, work)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
