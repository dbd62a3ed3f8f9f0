"""A complete full-size student, built for two targets: seconds and peak memory of every stage, beside bare converters.

    python tools/bench_scale.py --family sdxs-512 --work /tmp/scale --markdown docs/benchmarks/scale-sdxs-512.md

1. `edgegen student new` writes the student (random weights of the exact public configuration).
2. Bare: each component goes through `torch.export` and the converter's own documented call, once, in a process of its
   own; seconds are those of export, conversion and writing, imports not counted; the peak is the process's.
3. `edgegen build --backend all` for the first target with an empty cache, then for the second with what the first left.
   The whole command is timed, imports included; the peak of each stage is that of its child process, as its log has
   it, and "command" is the process that the user started.

`--work` keeps the student, the bare artifacts' figures and the bundles; what is there is not made again. Ratios are
what is asked for: the build's seconds over the sum of the bare converters', peaks over the component's fp32 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from turns import settings_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

CALLS = {
    "coreml": "ct.convert(exported.run_decompositions({}), compute_precision=FLOAT16), `alias` renamed to `clone` first, "
    "since coremltools stops at the first one",
    "executorch": "to_edge_transform_and_lower(exported, [XnnpackPartitioner()]).to_executorch()",
    "onnx": "torch.onnx.export(exported, dynamo=True)",
    "tflite": "litert_torch.convert(module, inputs).export()",
}
ASKED_PEAK = {"coreml": 3.0, "executorch": 3.0, "onnx": 3.0, "tflite": 5.0}
ASKED_TIME, ASKED_SECOND = 1.15, 0.25
_FACTS = re.compile(r"edgegen-child (\{.*\})")
MIB = 2**20


class Cost(BaseModel):
    """Seconds of wall time and peak resident bytes of one process."""

    seconds: float
    peak_bytes: int


class Build(BaseModel):
    """One `edgegen build`: `stages` maps the name of a child's log to its cost; empty where the cache had it."""

    target: str
    exit_code: int
    command: Cost
    stages: dict[str, Cost]


class Measured(BaseModel):
    parameters: dict[str, int]
    bare: dict[str, dict[str, Cost]] = {}
    """Backend -> component."""
    builds: list[Build] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="sdxs-512")
    parser.add_argument("--size", default="full")
    parser.add_argument("--targets", default="iphone15,pixel8")
    parser.add_argument("--backends", default=",".join(CALLS), help="for the bare converters")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--skip-builds", action="store_true", help="make the student and run the bare converters only")
    parser.add_argument("--bare", nargs=2, metavar=("BACKEND", "COMPONENT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.work / "model.pt"
    if options.bare is not None:
        print(bare(model, *options.bare, options.work).model_dump_json())
        return
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "measured.json"
    if not model.exists():
        made = _edgegen("student", "new", options.family, "--size", options.size, "-o", str(model), "--json")
        kept.write_text(Measured(parameters=json.loads(made.stdout)["parameters"]).model_dump_json())
    measured = Measured.model_validate_json(kept.read_text())
    for backend in options.backends.split(","):
        for component in measured.parameters:
            if component not in measured.bare.setdefault(backend, {}):
                measured.bare[backend][component] = _bare_in_child(options.work, backend, component)
                kept.write_text(measured.model_dump_json(indent=1))
                print("bare", backend, component, measured.bare[backend][component], file=sys.stderr, flush=True)
    if options.skip_builds:
        return
    environment = {**os.environ, "EDGEGEN_CACHE_DIR": str(options.work / "cache")}
    for target in options.targets.split(",")[len(measured.builds) :]:
        measured.builds.append(_build(options.work, target, model, environment))
        kept.write_text(measured.model_dump_json(indent=1))
        print("build", measured.builds[-1].model_dump_json(indent=1), file=sys.stderr, flush=True)
    text = table(measured, settings_of(options.backends.split(","), int(os.environ.get("OMP_NUM_THREADS", "0")) or 2))
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(f"# {options.family}, {options.size}: cost of a build\n\n{text}")


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
    return Cost(seconds=seconds, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def without_alias(exported: ExportedProgram) -> ExportedProgram:
    """The least that a user has to do by hand: coremltools does not know `aten.alias`, by which it calls a no-op."""
    import torch

    for node in exported.graph.nodes:
        if node.target is torch.ops.aten.alias.default:
            node.target = torch.ops.aten.clone.default
    return exported


def _bare_in_child(work: Path, backend: str, component: str) -> Cost:
    command = [sys.executable, __file__, "--work", str(work), "--bare", backend, component]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bare {backend} on {component}: {done.stderr[-2000:]}")
    return Cost.model_validate_json(done.stdout.splitlines()[-1])


def _build(work: Path, target: str, model: Path, environment: dict[str, str]) -> Build:
    output = work / target
    started = time.perf_counter()
    command = [sys.executable, "-m", "edgegen.cli.main", "build", "--target", target, "--backend", "all"]
    with subprocess.Popen([*command, "-o", str(output), str(model)], env=environment) as child:
        peak = _watch(child)
    seconds = time.perf_counter() - started
    folder = output if output.is_dir() else output.with_name(f"{output.name}.failed")
    stages = {}
    for log in sorted((folder / "reports/logs").glob("*.log")):
        found = [json.loads(text) for text in _FACTS.findall(log.read_text(errors="replace"))]
        if found and log.stat().st_mtime:
            stages[log.stem] = Cost(
                seconds=sum(one["seconds"] for one in found), peak_bytes=max(one["peak_mib"] for one in found) * MIB
            )
    return Build(
        target=target, exit_code=child.returncode, command=Cost(seconds=seconds, peak_bytes=peak), stages=stages
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


def table(measured: Measured, settings: dict[str, str]) -> str:
    """Everything as Markdown."""
    lines = [f"- {key}: {value}" for key, value in settings.items()]
    sizes = {name: 4 * count for name, count in measured.parameters.items()}
    lines += ["", "## Lowering, a component at a time", ""]
    lines += ["| backend | component | fp32 MB | bare s | bare peak MB | here s | here peak MB | peak / fp32 | asked |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    first = measured.builds[0] if measured.builds else None
    for backend, parts in measured.bare.items():
        for component, cost in parts.items():
            own = None if first is None else first.stages.get(f"{backend}-{component}")
            here = ["", "", "", ""]
            if own is not None:
                here = [f"{own.seconds:.1f}", _mb(own.peak_bytes), f"{own.peak_bytes / sizes[component]:.1f}x", ""]
            here[3] = f"<= {ASKED_PEAK[backend]:g}x"
            shown = [backend, component, _mb(sizes[component]), f"{cost.seconds:.1f}", _mb(cost.peak_bytes), *here]
            lines.append(f"| {' | '.join(shown)} |")
    total = sum(cost.seconds for parts in measured.bare.values() for cost in parts.values())
    lines += ["", "## The whole build", "", f"Bare converters together: {total:.1f} s.", ""]
    lines += ["| target | exit | seconds | against | ratio | asked | peak of the command, MB | lowered / verified |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for index, build in enumerate(measured.builds):
        against, asked = (total, ASKED_TIME) if index == 0 else (measured.builds[0].command.seconds, ASKED_SECOND)
        what = "bare converters" if index == 0 else f"{measured.builds[0].target}"
        ratio = build.command.seconds / against if against else float("nan")
        verifying = sum(cost.seconds for name, cost in build.stages.items() if name.endswith("-verify"))
        lowering = sum(cost.seconds for name, cost in build.stages.items() if not name.endswith("-verify"))
        seconds = f"{build.command.seconds:.1f} | {what} | {ratio:.2f}x | <= {asked:g}x"
        peak = _mb(build.command.peak_bytes)
        lines.append(
            f"| {build.target} | {build.exit_code} | {seconds} | {peak} | {lowering:.1f} s / {verifying:.1f} s |"
        )
    lines += ["", "## Verification", "", "| target | backend | seconds | peak MB |", "|---|---|---|---|"]
    for build in measured.builds:
        for name, cost in build.stages.items():
            if name.endswith("-verify"):
                lines.append(
                    f"| {build.target} | {name.removesuffix('-verify')} | {cost.seconds:.1f} | {_mb(cost.peak_bytes)} |"
                )
    calls = "\n".join(f"- {name}: `{call}`" for name, call in CALLS.items() if name in measured.bare)
    return "\n".join([*lines, "", "## Bare calls", "", calls, ""])


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f}"


if __name__ == "__main__":
    main()
