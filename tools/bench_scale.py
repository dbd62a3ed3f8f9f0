"""A complete full-size student, built for two targets: seconds and peak memory of every stage, beside bare converters.

    python tools/bench_scale.py --family sdxs-512 --work /tmp/scale --markdown docs/benchmarks/scale-sdxs-512.md
    python tools/bench_scale.py --family snapgen --lower-only --backends onnx,coreml --work /tmp/snapgen --markdown ...

1. `edgegen student new` writes the student (random weights of the exact public configuration).
2. Bare: each component goes through `torch.export` and the converter's own documented call, once, in a process of its
   own; seconds are those of export, conversion and writing, imports not counted; the peak is the process's.
3. `edgegen build --backend all` for the first target with an empty cache, then for the second with what the first left.
   The whole command is timed, imports included; the peak of each stage is that of its child process, as its log has
   it, and "command" is the process that the user started.

`--lower-only` leaves out 2 and 3: each component is rewritten for the first target's backends and lowered, in a process
of its own, whole, and nothing is executed; without samples, float16 is made safe by what the graph alone says.

`--work` keeps the student, all figures and the bundles; what is there is not made again, so a run that was stopped goes
on. Ratios are what is asked for: the build's seconds over the sum of the bare converters', peaks over the component's
fp32 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel
from scale_table import CALLS, Build, Cost, Lowering, Measured, table
from turns import settings_of

from edgegen.child import peak_bytes

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_FACTS = re.compile(r"edgegen-child (\{.*\})")
MIB = 2**20
Result = TypeVar("Result", bound=BaseModel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="sdxs-512")
    parser.add_argument("--size", default="full")
    parser.add_argument("--targets", default="iphone15,pixel8")
    parser.add_argument("--backends", default=",".join(CALLS), help="for the bare converters, and for --lower-only")
    parser.add_argument("--components", help="for --lower-only; default all")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--skip-builds", action="store_true", help="make the student and run the bare converters only")
    parser.add_argument("--lower-only", action="store_true", help="lower each component and execute nothing")
    parser.add_argument("--bare", nargs=2, metavar=("BACKEND", "COMPONENT"), help=argparse.SUPPRESS)
    parser.add_argument("--lower", nargs=2, metavar=("BACKEND", "COMPONENT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.work / "model.pt"
    if options.bare is not None:
        print(bare(model, *options.bare, options.work).model_dump_json())
        return
    if options.lower is not None:
        print(lower(model, options.targets.split(",")[0], *options.lower, options.work).model_dump_json())
        return
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "measured.json"
    if not model.exists():
        made = _edgegen("student", "new", options.family, "--size", options.size, "-o", str(model), "--json")
        kept.write_text(Measured(parameters=json.loads(made.stdout)["parameters"]).model_dump_json())
    measured = Measured.model_validate_json(kept.read_text())
    if options.lower_only:
        _lower_all(options, measured, kept)
    else:
        _bare_all(options, measured, kept)
        if options.skip_builds:
            return
        _build_all(options, measured, kept, model)
    text = table(measured, settings_of(options.backends.split(","), int(os.environ.get("OMP_NUM_THREADS", "0")) or 2))
    print(text)
    if options.markdown is not None:
        what = "cost of lowering" if options.lower_only else "cost of a build"
        options.markdown.write_text(f"# {options.family}, {options.size}: {what}\n\n{text}")


def _bare_all(options: argparse.Namespace, measured: Measured, kept: Path) -> None:
    for backend in options.backends.split(","):
        for component in measured.parameters:
            if component not in measured.bare.setdefault(backend, {}):
                measured.bare[backend][component] = _in_child(options, "--bare", backend, component, Cost)
                kept.write_text(measured.model_dump_json(indent=1))
                print("bare", backend, component, measured.bare[backend][component], file=sys.stderr, flush=True)


def _lower_all(options: argparse.Namespace, measured: Measured, kept: Path) -> None:
    chosen = options.components.split(",") if options.components else list(measured.parameters)
    for backend in options.backends.split(","):
        for component in chosen:
            if component not in measured.lowerings.setdefault(backend, {}):
                found = _in_child(options, "--lower", backend, component, Lowering)
                measured.lowerings[backend][component] = found
                kept.write_text(measured.model_dump_json(indent=1))
                print("lower", backend, component, found, file=sys.stderr, flush=True)


def _build_all(options: argparse.Namespace, measured: Measured, kept: Path, model: Path) -> None:
    environment = {**os.environ, "EDGEGEN_CACHE_DIR": str(options.work / "cache")}
    for target in options.targets.split(",")[len(measured.builds) :]:
        measured.builds.append(_build(options.work, target, model, environment))
        kept.write_text(measured.model_dump_json(indent=1))
        print("build", measured.builds[-1].model_dump_json(indent=1), file=sys.stderr, flush=True)


def bare(model: Path, backend: str, component: str, work: Path) -> Cost:
    """The converter's own call on one component; the process's peak is counted from its start."""
    import torch

    from edgegen.students.load import load

    part = load(model).components[component]
    inputs = part.example_inputs()
    out = work / f"bare-{component}.{backend}"
    if backend == "coreml":
        import coremltools as ct
    elif backend == "executorch":
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    elif backend == "tflite":
        import litert_torch
    else:
        import onnxscript  # noqa: F401  (the exporter imports it when it is called)
    started = time.perf_counter()
    if backend == "tflite":
        litert_torch.convert(part.module, inputs).export(str(out))
    else:
        exported = torch.export.export(part.module, inputs)
        if backend == "coreml":
            # A package's name is its kind.
            out = out.with_suffix(".mlpackage")
            ct.convert(
                without_alias(exported.run_decompositions({})),
                minimum_deployment_target=ct.target.iOS17,
                compute_precision=ct.precision.FLOAT16,
            ).save(str(out))
        elif backend == "executorch":
            lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            out.write_bytes(lowered.to_executorch().buffer)
        else:
            torch.onnx.export(exported, (), dynamo=True).save(str(out), external_data=True)
    seconds = time.perf_counter() - started
    for one in work.glob(f"bare-{component}.*"):
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    return Cost(seconds=seconds, peak_bytes=peak_bytes())


def without_alias(exported: ExportedProgram) -> ExportedProgram:
    """The least that a user has to do by hand: coremltools does not know `aten.alias`, by which it calls a no-op."""
    import torch

    for node in exported.graph.nodes:
        if node.target is torch.ops.aten.alias.default:
            node.target = torch.ops.aten.clone.default
    return exported


def lower(model: Path, target: str, backend: str, component: str, work: Path) -> Lowering:
    """One component rewritten and lowered as a build for `target` would, in one piece, and thrown away."""
    from edgegen.build.clock import Clock
    from edgegen.build.graphs import Graphs
    from edgegen.build.lowering import LowerFailure, LowerJob, lower_all
    from edgegen.build.recipe import BuildOptions, resolve
    from edgegen.cache import Cache
    from edgegen.rewrite.pipeline import pipeline_of
    from edgegen.students.load import load
    from edgegen.targets import load_target

    student = load(model)
    recipe = resolve(student, load_target(target), BuildOptions(backends=(backend,)), work / "none")
    own = recipe.backends[0]
    job = LowerJob(
        student.components[component],
        backend,
        recipe.precision(own, component),
        own.lowering_options,
        pipeline_of(recipe.canonical[component]),
        pipeline_of(own.passes),
    )
    scratch, clock = work / "scratch", Clock()
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        (found,) = lower_all([job], Graphs(), Cache(scratch), scratch / "logs", lambda job: None, clock)
        if isinstance(found, LowerFailure):
            return Lowering(refused=" ".join(str(found.error).split()), peak_bytes=peak_bytes())
        took = {span.name.rpartition(": ")[2]: span.seconds for span in clock.spans()}
        facts = [json.loads(text) for text in _FACTS.findall(found.log.read_text(errors="replace"))]
        return Lowering(
            rewrite_seconds=took["rewrite"] + took["forecast"],
            convert_seconds=took["convert"],
            child_peak_bytes=max(one["peak_mib"] for one in facts) * MIB,
            peak_bytes=peak_bytes(),
            artifact_bytes=sum(one.stat().st_size for one in found.folder.rglob("*") if one.is_file()),
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _in_child(options: argparse.Namespace, what: str, backend: str, component: str, result: type[Result]) -> Result:
    command = [sys.executable, __file__, "--work", str(options.work), "--targets", options.targets]
    done = subprocess.run([*command, what, backend, component], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} {backend} on {component}: {done.stderr[-2000:]}")
    return result.model_validate_json(done.stdout.splitlines()[-1])


def _build(work: Path, target: str, model: Path, environment: dict[str, str]) -> Build:
    output = work / target
    started = time.perf_counter()
    command = [sys.executable, "-m", "edgegen.cli.main", "build", "--target", target, "--backend", "all"]
    with subprocess.Popen([*command, "-o", str(output), str(model)], env=environment) as child:
        peak = _watch(child)
    wall = time.perf_counter() - started
    folder = output if output.is_dir() else output.with_name(f"{output.name}.failed")
    spans = json.loads((folder / "reports/times.json").read_text())
    took = {one["name"]: one["seconds"] for one in spans}
    stages = {}
    for log in sorted((folder / "reports/logs").glob("*.log")):
        found = [json.loads(text) for text in _FACTS.findall(log.read_text(errors="replace"))]
        seconds = sum(one["seconds"] for one in found)
        # The log of what the cache had is there too, and tells of another build.
        work = [f"{log.stem}: convert", f"{log.stem}: cast", f"{log.stem.removesuffix('-verify')}: verify"]
        if found and max(took.get(name, 0.0) for name in work) >= seconds:
            stages[log.stem] = Cost(seconds=seconds, peak_bytes=max(one["peak_mib"] for one in found) * MIB)
    return Build(
        target=target,
        exit_code=child.returncode,
        command=Cost(seconds=wall, peak_bytes=peak),
        stages=stages,
        spans=[(one["name"], one["start"], one["seconds"]) for one in spans],
    )


def _watch(child: subprocess.Popen[bytes]) -> int:
    """The highest resident size of the command's own process; those that it starts are counted for themselves."""
    peak = 0
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            peak = max(peak, int(line.split()[1]) * 1024)
        except (OSError, StopIteration):
            pass
        time.sleep(0.2)
    return peak


def _edgegen(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgegen.cli.main", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)


if __name__ == "__main__":
    main()
