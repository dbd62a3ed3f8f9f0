"""The Core ML evaluator on an SDXS-512-shaped UNet: time against torch eager, memory against its weights, and numbers.

    python tools/bench_mlprogram.py --packages /tmp/unet --markdown docs/benchmarks/mlprogram.md

The network has 315.7 M parameters, a 64x64 latent and random weights, and is lowered to Core ML in fp32 and fp16 as a
build does (half a minute and 4 GB each; `--packages` keeps them and finds them again).

Time: torch eager in fp32 and the evaluator in one process, a call of the one and then one of the other, so a machine
that is busy for a while slows down both; the ratio is that of the medians. Memory: the highest resident size of a child
process that opens the package, computes once and leaves, the interpreter, torch and coremltools included; weights are
the bytes of the package's weight files. SQNR: against torch fp32 for the same inputs; a fp16 package under fp32
arithmetic computes with the fp16 weights of the file and rounds nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from edgegen.cores import cores
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import LowerRequest, Precision, get_backend
from edgegen.profile.host import this_host
from edgegen.students.networks.unet import UNet, UNetConfig
from edgegen.verify.metrics import sqnr_db
from mlprogram import Arithmetic, Program

SEED = 0
NAMES = ("latent", "timestep", "context")
OUTPUT = TensorSpec(name="prediction", shape=(1, 4, 64, 64))
ROWS: tuple[tuple[Precision, Arithmetic], ...] = (("fp32", "declared"), ("fp16", "declared"), ("fp16", "fp32"))
ASKED_RATIO, ASKED_MEMORY, ASKED_SQNR = 5.0, 3.0, 60.0


class Row(BaseModel):
    """One package under one arithmetic. Times in milliseconds, sizes in bytes."""

    package: str
    arithmetic: str
    operations: int
    weight_bytes: int
    open_ms: float
    eager_ms: float
    evaluator_ms: float
    ratio: float
    peak_bytes: int
    memory_ratio: float
    sqnr_db: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder that keeps the packages")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=7, help="calls of each that count")
    parser.add_argument("--precision", choices=("fp32", "fp16"), nargs="+", default=["fp32", "fp16"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--arithmetic", default="declared", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child is not None:
        print(_peak(options.child, options.arithmetic))
        return
    settings = _settings(options)
    print("\n".join(f"{name}: {value}" for name, value in settings.items()), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-mlprogram-") as folder:
        packages = options.packages or Path(folder)
        module, inputs = network(), arrays()
        rows = []
        for precision, arithmetic in ROWS:
            if precision not in options.precision:
                continue
            path = _package(module, precision, packages)
            rows.append(_measure(module, inputs, path, precision, arithmetic, options))
            print(rows[-1].model_dump_json(), flush=True)
            # After every row: a machine that is busy may stop this half-way.
            if options.json:
                text = json.dumps({"settings": settings, "rows": [row.model_dump() for row in rows]}, indent=2)
                options.json.write_text(text + "\n")
            if options.markdown:
                options.markdown.write_text(_markdown(settings, rows))


def network() -> UNet:
    """315.7 M parameters, shaped as SDXS-512's."""
    torch.manual_seed(SEED)
    return UNet(UNetConfig(sample_size=64)).eval()


def arrays() -> dict[str, NDArray[np.generic]]:
    """Inputs by name: fixed noise, the timestep that SDXS uses, a context like CLIP's."""
    generator = torch.Generator().manual_seed(SEED + 1)
    values = (
        torch.randn(1, 4, 64, 64, generator=generator),
        torch.tensor([999.0]),
        torch.randn(1, 77, 768, generator=generator),
    )
    return {name: value.numpy() for name, value in zip(NAMES, values, strict=True)}


def _package(module: UNet, precision: Precision, packages: Path) -> Path:
    folder = packages / precision
    found = list(folder.glob("*.mlpackage"))
    if found:
        return found[0]
    folder.mkdir(parents=True)
    given = tuple(torch.from_numpy(value) for value in arrays().values())
    with torch.no_grad():
        program = torch.export.export(module, given)
    specs = tuple(TensorSpec(name=name, shape=tuple(value.shape)) for name, value in zip(NAMES, given, strict=True))
    lowered = get_backend("coreml").lower(program, LowerRequest("denoiser", specs, (OUTPUT,), precision, folder))
    return folder / lowered.file


def _measure(
    module: UNet,
    inputs: dict[str, NDArray[np.generic]],
    path: Path,
    precision: Precision,
    arithmetic: Arithmetic,
    options: argparse.Namespace,
) -> Row:
    started = time.perf_counter()
    program = Program.open(path, arithmetic=arithmetic)
    open_ms = (time.perf_counter() - started) * 1e3
    given = tuple(torch.from_numpy(value) for value in inputs.values())
    turns = []
    with torch.inference_mode():
        for _ in range(1 + options.repeats):
            started = time.perf_counter()
            expected = module(*given).numpy()
            between = time.perf_counter()
            found = program(inputs)[OUTPUT.name]
            turns.append((between - started, time.perf_counter() - between))
    eager, evaluator = (statistics.median(turn[side] for turn in turns[1:]) * 1e3 for side in (0, 1))
    weights = sum(one.stat().st_size for one in (path / "Data").rglob("*.bin"))
    child = [sys.executable, __file__, "--threads", str(options.threads), "--child", str(path)]
    done = subprocess.run([*child, "--arithmetic", arithmetic], check=True, capture_output=True, text=True)
    peak = int(done.stdout.split()[-1])
    return Row(
        package=precision,
        arithmetic=arithmetic,
        operations=len(program.operations),
        weight_bytes=weights,
        open_ms=round(open_ms, 1),
        eager_ms=round(eager, 1),
        evaluator_ms=round(evaluator, 1),
        ratio=round(evaluator / eager, 2),
        peak_bytes=peak,
        memory_ratio=round(peak / weights, 2),
        sqnr_db=round(sqnr_db(expected, found), 1),
    )


def _peak(path: Path, arithmetic: Arithmetic) -> int:
    """Open, compute once, and give the highest resident size of this process in bytes."""
    Program.open(path, arithmetic=arithmetic)(arrays())
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: on Linux that starts at what the parent had when it forked, and the parent holds the network.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    # getrusage(2): KiB, on macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _settings(options: argparse.Namespace) -> dict[str, str]:
    host = this_host()
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "coremltools")}
    return {
        "command": "python " + " ".join(sys.argv),
        "network": "UNet of 315.7 M parameters, 64x64 latent, 77 x 768 context, batch 1, random weights, iOS 17",
        "cpu": host.cpu,
        "system": f"{host.os}, Python {platform.python_version()}",
        "threads": str(options.threads),
        "repeats": f"{options.repeats} calls of each in turns, medians, after 1 that does not count",
        "load average at the start": str(host.load_average),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _markdown(settings: dict[str, str], rows: list[Row]) -> str:
    lines = ["# The Core ML evaluator on an SDXS-512-shaped UNet", ""]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    lines += [
        "",
        "| package | arithmetic | operations | weights MB | open ms | torch eager ms | evaluator ms | ratio | peak MB "
        "| peak / weights | SQNR to torch fp32, dB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        said = "as declared" if row.arithmetic == "declared" else row.arithmetic
        lines.append(
            f"| {row.package} | {said} | {row.operations} | {row.weight_bytes / 1e6:.1f} | {row.open_ms} "
            f"| {row.eager_ms} | {row.evaluator_ms} | {row.ratio} | {row.peak_bytes / 1e6:.0f} | {row.memory_ratio} "
            f"| {row.sqnr_db} |"
        )
    lines += [
        "",
        f"Asked: a ratio of at most {ASKED_RATIO:g}, memory of at most {ASKED_MEMORY:g} times the weights, and at "
        f"least {ASKED_SQNR:g} dB for fp32 arithmetic. Weights are the bytes of the package's own weight files; the "
        "peak is of a process that opens the package and computes once, interpreter and libraries included. Absolute "
        "times are of a busy machine; both sides of a ratio were measured in turns on it.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
