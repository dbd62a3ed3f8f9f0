"""Our plans beside each runtime's own quantizer: bytes, likeness to the float network, latency, in one run.

    python tools/bench_int8.py --model shapes S64 --backend tflite executorch onnx --markdown table.md --json table.json

For every network and backend: the plain export in fp32, our plans (`int8_ours.PLANS`), and what the runtime's own tools
make of the plain export with the settings that they come with. All are judged on inputs that none was calibrated on:
SQNR in dB against the network in torch fp32. Artifacts of one network and backend are called in turns, so a machine
that is busy for a while slows all of them down; latency is the median, `to plain fp32` the ratio of medians. Plans come
from `--cache` where they were made before by the same code, in which case quantizing takes no time.

NNCF and OpenVINO cannot live in this environment: `--nncf-python` names a Python that has `nncf`, `openvino`, `onnx`
and `onnxruntime`; then NNCF's default on the ONNX file runs on onnxruntime, and its int8 for transformers on OpenVINO,
in turns with the rest; with `--no-defaults` OpenVINO alone. `--together` puts all backends into the same turns, which
is fair to networks that take long: threads that one runtime leaves waiting disturb the next for a millisecond. Core ML
and Core AI have plans of their own (`int8_ours.APPLE_PLANS`); they are computed by `mlprogram` and by Core AI's CPU
runtime, and not timed.

Models: `shapes`, the denoiser and the decoder of the demo student, on its own trajectory; S64, a UNet of 12.9 M
parameters at a 32x32 latent, and R, one of 315.7 M shaped as SDXS-512's, both with random weights, on random inputs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from int8_ours import APPLE, PLAIN, PLANS, Ours
from int8_rows import Failed, Made, Row, joined, line, markdown, size_of
from int8_theirs import THEIRS, nncf
from subjects import MODELS, Subject, subjects
from turns import WARM_UP, in_turns, keep_to, settings_of

from edgegen.build.graphs import Graphs
from edgegen.cache import Cache
from edgegen.cores import cores
from edgegen.verify.metrics import sqnr_db


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["shapes"])
    parser.add_argument("--component", nargs="+", default=["denoiser", "decoder"], help="of `shapes`")
    parser.add_argument("--backend", choices=sorted(THEIRS), nargs="+", default=["tflite"])
    parser.add_argument("--plan", choices=sorted(PLANS), nargs="+", default=list(PLANS))
    parser.add_argument("--no-defaults", action="store_true", help="leave the runtimes' own recipes out")
    parser.add_argument("--nncf-python", type=Path, metavar="PATH", help="a Python that has NNCF and OpenVINO")
    parser.add_argument("--together", action="store_true", help="call the artifacts of all backends in the same turns")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=40, help="calls of each artifact that count; 0: no latency")
    parser.add_argument("--cache", type=Path, help="where plans are kept; default: nowhere")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the artifacts stay, to be looked into")
    parser.add_argument("--title", default="INT8: plans beside the runtimes' own recipes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_to(options.threads)
    torch.set_num_threads(options.threads)
    tools = ("ai-edge-quantizer", "torchao", "coremltools", "coreai-opt")
    theirs = ", ".join(f"{name} {metadata.version(name)}" for name in tools)
    repeats = f"{options.repeats} calls of each artifact in turns, medians, after {WARM_UP} that do not count"
    repeats = repeats if options.repeats else "none: no latency was measured"
    settings = settings_of(options.backend, options.threads, repeats=repeats, quantizers=theirs)
    print("\n".join(f"{name}: {value}" for name, value in settings.items()), file=sys.stderr, flush=True)
    started = time.perf_counter()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-int8-cache-") as empty:
        cache = Cache(options.cache or Path(empty))
        for subject in (one for model in options.model for one in subjects(model, options.component)):
            bench = _Bench(subject, cache, options)
            for backends in [options.backend] if options.together else [[name] for name in options.backend]:
                for row in bench.rows(backends):
                    rows.append(row)
                    print(line(row), flush=True)
                settings["load average at the end"] = str(os.getloadavg())
                settings["this run"] = f"{time.perf_counter() - started:.0f} s, {_peak():.1f} GB at most in memory"
                _write(options, settings, rows)
                gc.collect()


def _write(options: argparse.Namespace, settings: dict[str, str], rows: list[Row]) -> None:
    """After every table, so that a run that is ended early says what it found."""
    if options.json:
        found = {"settings": settings, "rows": [row.model_dump() for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(options.title, settings, rows))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@dataclass(frozen=True)
class _Bench:
    """One network, and what is asked of it."""

    subject: Subject
    cache: Cache
    options: argparse.Namespace
    graphs: Graphs = field(default_factory=Graphs)

    def rows(self, backends: Sequence[str]) -> Iterator[Row]:
        """Of `backends`, all artifacts called in the same turns; those that failed come first."""
        with tempfile.TemporaryDirectory(prefix="bench-int8-") as name:
            made: list[tuple[Row, Made]] = []
            for backend in backends:
                folder = (self.options.keep or Path(name)) / self.subject.name / backend
                folder.mkdir(parents=True, exist_ok=True)
                for row, one in self._judged(Ours(self.subject, backend, self.cache, folder, self.graphs)):
                    if one is None:
                        yield row
                    else:
                        print(f"  made: {line(row)}", file=sys.stderr, flush=True)
                        made.append((row, one))
            gc.collect()
            timed = [one for one in made if self.options.repeats and one[0].backend not in APPLE]
            medians = in_turns([one.timed(self.subject.held_out[0]) for _, one in timed], self.options.repeats)
            plain = {row.backend: took for (row, _), took in zip(timed, medians, strict=True) if row.row == PLAIN}
            for (row, _), took in zip(timed, medians, strict=True):
                row.ms, row.to_fp32 = round(took * 1e3, 2), round(took / plain[row.backend], 3)
            yield from (row for row, _ in made)

    def _judged(self, ours: Ours) -> Iterator[tuple[Row, Made | None]]:
        """Every artifact with what is known of it before it is timed; None for one that is not there."""
        with torch.no_grad():
            expected = joined([self.subject.module(*one.values()).numpy() for one in self.subject.held_out])
        for one in self._artifacts(ours):
            row = Row(model=self.subject.name, backend=ours.backend, row=one.row)
            if isinstance(one, Failed):
                row.note = one.why
                yield row, None
                continue
            row.sqnr_db = round(sqnr_db(expected, joined([one.run(given) for given in self.subject.held_out])), 1)
            row.megabytes, row.note = round(size_of(one.path) / 1e6, 2), one.note
            row.quantizing_s = round(one.quantizing_s, 1) if one.quantizing_s else None
            row.lowering_s = round(one.lowering_s, 1) if one.lowering_s else None
            yield row, one

    def _artifacts(self, ours: Ours) -> Iterator[Made | Failed]:
        yield from ours.rows(self.options.plan)
        at = ours.folder / "theirs"
        at.mkdir()
        if not self.options.no_defaults:
            yield from THEIRS[ours.backend](ours, at)
        if ours.backend == "onnx" and (self.options.nncf_python or not self.options.no_defaults):
            yield from nncf(ours, at, self.options.nncf_python, not self.options.no_defaults)


if __name__ == "__main__":
    main()
