"""Every family at its small size, for several targets, with every backend that they run: what came out, by stage.

    python tools/conformance.py --json docs/conformance.json --markdown docs/families.md
    python tools/conformance.py --families sdxs-512,snapgen --targets pixel8 --json /tmp/some.json

Each family's `tiny` student is written with `edgegen student new` and built with `edgegen build --backend all`, as a
user would, in processes of their own. An outcome is that of the component that came least far: SUCCESS when every
artifact was executed here and met every gate; UNDELEGATED, LOWER_FAIL, LOAD_FAIL, RUN_FAIL, MISMATCH or NOT_EXECUTED as
in `edgegen.verify.outcome`; BUILD_FAIL when the build gave nothing that could be read. Results are kept in the JSON
file after every build, and a run that is started again goes on behind the last of them; `--again` makes them all anew.
The page is generated from that file and from nothing else (`--no-run` writes it alone).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from edgegen.errors import EdgegenError
from edgegen.students.families.registry import Family, families, parameters
from edgegen.verify.outcome import ComponentParity, Outcome, ParityReport

TARGETS = ("iphone15", "iphone17", "pixel8", "linux-x86")
ORDER = (
    *(Outcome.LOWER_FAIL, Outcome.LOAD_FAIL, Outcome.RUN_FAIL, Outcome.MISMATCH, Outcome.NOT_EXECUTED),
    *(Outcome.UNDELEGATED, Outcome.SUCCESS),
)
"""From the least far to the farthest."""
TIMEOUT_S = 1800
VERSIONS = ("torch", "coremltools", "coreai-torch", "executorch", "litert-torch", "onnxruntime", "diffusers")


class Cell(BaseModel):
    """One family on one target with one backend."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    size: str
    target: str
    backend: str
    precision: str = ""
    outcome: str
    component: str = ""
    """Which came least far; empty where all of them came through."""
    reason: str = ""
    sqnr_db: float | str | None = None
    picture_psnr_db: float | str | None = None
    sensitivity: float | None = None
    executed_by: str | None = None


class Results(BaseModel):
    """All cells so far, and what they were made with. `seconds`: `family target` -> what the build took."""

    model_config = ConfigDict(extra="forbid")

    versions: dict[str, str] = {}
    cells: list[Cell] = []
    seconds: dict[str, float] = {}

    def has(self, family: str, target: str) -> bool:
        return f"{family} {target}" in self.seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="", help="names between commas; default: all")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--again", action="store_true", help="forget what the JSON file holds of these families")
    parser.add_argument("--no-run", action="store_true")
    options = parser.parse_args(arguments)
    names = [name for name in options.families.split(",") if name] or list(families())
    results = Results.model_validate_json(options.json.read_text()) if options.json.exists() else Results()
    if not options.no_run:
        for name in names:
            for target in options.targets.split(","):
                if options.again or not results.has(name, target):
                    run_one(results, name, options.size, target)
                    options.json.write_text(results.model_dump_json(indent=1) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(page(results))


def run_one(results: Results, name: str, size: str, target: str) -> None:
    """Make the student, build it, and put what came of it into `results` in place of what was there."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="edgegen-conformance-") as scratch:
        model, output = Path(scratch, "model.pt"), Path(scratch, "bundle")
        made = _edgegen("student", "new", name, "--size", size, "-o", str(model))
        built = made if made.returncode else _edgegen(
            "build", "--target", target, "--backend", "all", "-o", str(output), str(model)
        )  # fmt: skip
        cells = _cells(name, size, target, output, built)
    results.cells = [one for one in results.cells if (one.family, one.target) != (name, target)] + cells
    results.cells.sort(key=lambda one: (one.family, one.target, one.backend))
    results.seconds[f"{name} {target}"] = round(time.perf_counter() - started, 1)
    results.versions = {one: metadata.version(one) for one in VERSIONS}
    print(name, target, ", ".join(f"{one.backend} {one.outcome}" for one in cells), file=sys.stderr, flush=True)


def _edgegen(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgegen.cli.main", *arguments, "--json"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        # A result like any other: the run goes on behind it, and the page says so.
        return subprocess.CompletedProcess(command, 1, "", f"not done after {TIMEOUT_S} s")


def _cells(name: str, size: str, target: str, output: Path, built: subprocess.CompletedProcess[str]) -> list[Cell]:
    folder = next((one for one in (output, output.with_name(f"{output.name}.failed")) if one.is_dir()), None)
    if folder is None:
        said = [line for line in built.stderr.splitlines() if line.startswith("error: ")]
        reason = said[0].removeprefix("error: ") if said else f"exit {built.returncode}"
        return [
            Cell(family=name, size=size, target=target, backend="", outcome="BUILD_FAIL", reason=reason.strip()[:300])
        ]
    found = json.loads((folder / "reports/parity.json").read_text())
    reports = [ParityReport.model_validate(one) for one in found.values()]
    return [_cell(name, size, target, report) for report in reports]


def _cell(name: str, size: str, target: str, report: ParityReport) -> Cell:
    worst = min(report.components, key=lambda part: ORDER.index(part.outcome))
    outcome, component, reason = str(worst.outcome), worst.component, worst.reason or ""
    if worst.outcome in (Outcome.SUCCESS, Outcome.UNDELEGATED):
        component = ""
        if report.failed:
            gate = report.failed[0]
            outcome, component = str(Outcome.MISMATCH), gate.subject
            reason = f"{gate.gate}: {gate.measured}, {gate.required} required"
    elif not reason:
        reason = _gate_of(report, worst)
    sensitivity = report.worst_sensitivity
    return Cell(
        family=name,
        size=size,
        target=target,
        backend=report.backend,
        precision=report.precision,
        outcome=outcome,
        component=component,
        reason=" ".join(reason.split())[:300],
        sqnr_db=_plain(report.worst_sqnr_db),
        picture_psnr_db=_plain(report.worst_psnr_db),
        sensitivity=None if sensitivity is None or sensitivity.ratio is None else round(sensitivity.ratio, 4),
        executed_by=report.executed_by,
    )


def _gate_of(report: ParityReport, part: ComponentParity) -> str:
    mine = [gate for gate in report.failed if part.component in gate.subject]
    return f"{mine[0].gate}: {mine[0].measured}, {mine[0].required} required" if mine else ""


def _plain(value: float | None) -> float | str | None:
    if value is None or abs(value) == float("inf") or value != value:
        return None if value is None else str(value)
    return round(value, 1)


def page(results: Results) -> str:
    """The support table as Markdown."""
    known = families()
    columns = sorted({(one.target, one.backend) for one in results.cells if one.backend})
    targets = list(dict.fromkeys(target for target, _ in columns))
    lines = [
        "# Families",
        "",
        "What `edgegen student new FAMILY` makes: architectures of published few-step students with random weights. "
        "Generated by `python tools/conformance.py`; do not edit.",
        "",
        "## Outcome by target and backend",
        "",
        "Small students with every feature of their family, built with `--backend all`, every artifact executed on "
        "the machine that built it (Core ML by edgegen's reference evaluator): SUCCESS means that every gate was met.",
        "",
    ]
    for target in targets:
        mine = [backend for where, backend in columns if where == target]
        lines += [f"### {target}", "", "| family | " + " | ".join(mine) + " |", "|---|" + "---|" * len(mine)]
        notes: list[str] = []
        for name in dict.fromkeys(one.family for one in results.cells if one.target == target):
            cells = {one.backend: one for one in results.cells if (one.family, one.target) == (name, target)}
            if "" in cells:
                lines.append(f"| {name} | " + " | ".join(["BUILD_FAIL"] * len(mine)) + " |")
            else:
                lines.append(f"| {name} | " + " | ".join(_text(cells.get(backend)) for backend in mine) + " |")
            notes += [
                f"- {name}, {one.backend or 'build'}: {one.component + ': ' if one.component else ''}{one.reason}"
                for one in cells.values()
                if one.outcome != "SUCCESS"
            ]
        lines += ["", *notes, *([""] if notes else [])]
    absent = {name: [one for one in TARGETS if not results.has(name, one)] for name in known}
    if any(absent.values()):
        lines += ["## Not run", "", "Nothing is claimed for these.", ""]
        lines += [f"- {name}: {', '.join(where)}" for name, where in absent.items() if where] + [""]
    lines += ["## Sizes and sources", "", "| family | size | parameters, M | by component |", "|---|---|---|---|"]
    for one in known.values():
        lines += _sizes(one)
    lines.append("")
    for one in known.values():
        lines += [f"### {one.name}", "", one.summary, "", *(f"- from {source}" for source in one.sources)]
        lines += [*(f"- our reading: {reading}" for reading in one.readings), ""]
    made = ", ".join(f"{name} {version}" for name, version in sorted(results.versions.items()))
    return "\n".join([*lines, f"Made with {made}.", ""])


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "not offered"
    if cell.outcome != "SUCCESS":
        return f"{cell.outcome} ({cell.precision})"
    return f"SUCCESS, {cell.precision}, {cell.sqnr_db} dB"


def _sizes(family: Family) -> list[str]:
    rows = []
    for size, build in family.sizes.items():
        try:
            counts = parameters(build())
        except EdgegenError as error:
            rows.append(f"| {family.name} | {size} | {error.message} | |")
            continue
        parts: dict[str, Any] = {name: f"{name} {count / 1e6:.2f}" for name, count in counts.items()}
        rows.append(f"| {family.name} | {size} | {sum(counts.values()) / 1e6:.1f} | {', '.join(parts.values())} |")
    return rows


if __name__ == "__main__":
    main()
