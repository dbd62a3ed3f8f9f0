"""What `bench_scale.py` measured, and the tables that it publishes."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

CALLS = {
    "coreml": "ct.convert(exported.run_decompositions({}), compute_precision=FLOAT16), each `alias` made a `clone` "
    "first, since coremltools stops at it",
    "executorch": "to_edge_transform_and_lower(exported, [XnnpackPartitioner()]).to_executorch()",
    "onnx": "torch.onnx.export(exported, dynamo=True)",
    "tflite": "litert_torch.convert(module, inputs).export()",
}
ASKED_PEAK = {"coreml": 3.0, "executorch": 3.0, "onnx": 3.0, "tflite": 5.0}
ASKED_TIME, ASKED_SECOND = 1.15, 0.25
SMALL = 100e6
"""Bytes of weights below which a peak is that of the converter's own libraries, and its ratio says nothing."""
SHOWN_S = 0.5
STAGES = ("reference in torch", "lower", "verify")


class Cost(BaseModel):
    """Seconds of wall time and peak resident bytes of one process."""

    seconds: float
    peak_bytes: int


class Lowering(BaseModel):
    """One component through one backend and nothing else; `refused` says why there is no artifact."""

    rewrite_seconds: float = 0.0
    convert_seconds: float = 0.0
    child_peak_bytes: int = 0
    peak_bytes: int = 0
    """Of the process that rewrites the graph, the student's mapped file included."""
    artifact_bytes: int = 0
    parts: int = 1
    refused: str | None = None


class Build(BaseModel):
    """One `edgegen build`: `stages` maps the name of a child's log to its cost, `spans` are (name, start, seconds) of
    the command itself."""

    target: str
    exit_code: int
    command: Cost
    stages: dict[str, Cost]
    spans: list[tuple[str, float, float]] = []


class Measured(BaseModel):
    parameters: dict[str, int]
    bare: dict[str, dict[str, Cost]] = {}
    """Backend -> component."""
    builds: list[Build] = []
    lowerings: dict[str, dict[str, Lowering]] = {}
    """Backend -> component."""


def table(measured: Measured, settings: Mapping[str, str]) -> str:
    """Everything as Markdown."""
    lines = [f"- {key}: {value}" for key, value in settings.items()]
    if measured.builds:
        lines += _builds(measured) + _components(measured) + _seconds(measured) + _verification(measured)
    elif measured.bare:
        lines += _components(measured)
    if measured.lowerings:
        lines += _lowerings(measured)
    if measured.bare:
        calls = "\n".join(f"- {name}: `{call}`" for name, call in CALLS.items() if name in measured.bare)
        lines += ["", "## Bare calls", "", calls]
    return "\n".join([*lines, ""])


def _builds(measured: Measured) -> list[str]:
    total = sum(cost.seconds for parts in measured.bare.values() for cost in parts.values())
    lines = ["", "## The whole build", "", f"Bare converters together: {total:.1f} s.", ""]
    lines += ["| target | exit | seconds | against | ratio | asked | peak of the command, MB |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for index, build in enumerate(measured.builds):
        against, asked = (total, ASKED_TIME) if index == 0 else (measured.builds[0].command.seconds, ASKED_SECOND)
        what = "bare converters" if index == 0 else f"{measured.builds[0].target}"
        ratio = build.command.seconds / against if against else float("nan")
        seconds = f"{build.command.seconds:.1f} | {what} | {ratio:.2f}x | <= {asked:g}x"
        lines.append(f"| {build.target} | {build.exit_code} | {seconds} | {_mb(build.command.peak_bytes)} |")
    lines.append("")
    for build in measured.builds:
        took = {name: seconds for name, _, seconds in build.spans}
        main = {name: took.get(name, 0.0) for name in STAGES}
        told = [
            f"{name} {seconds:.1f} s ({seconds / total:.2f}x of the bare converters)" for name, seconds in main.items()
        ]
        lines.append(
            f"- {build.target}: {', '.join(told)}, all else {build.command.seconds - sum(main.values()):.1f} s"
        )
    return lines


def _components(measured: Measured) -> list[str]:
    """Bare converters beside the first build's children, a component at a time."""
    sizes = {name: 4 * count for name, count in measured.parameters.items()}
    lines = ["", "## Lowering, a component at a time", ""]
    lines += ["The seconds here are those of a child process beside another one; a small component has no ratio.", ""]
    lines += ["| backend | component | fp32 MB | bare s | bare peak MB | here s | here peak MB | peak / fp32 | asked |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    first = measured.builds[0] if measured.builds else None
    for backend, parts in measured.bare.items():
        for component, cost in parts.items():
            own = None if first is None else first.stages.get(f"{backend}-{component}")
            here = ["", "", ""]
            if own is not None:
                large = sizes[component] >= SMALL
                ratio = f"{own.peak_bytes / sizes[component]:.1f}x" if large else ""
                here = [f"{own.seconds:.1f}", _mb(own.peak_bytes), ratio]
            shown = [backend, component, _mb(sizes[component]), f"{cost.seconds:.1f}", _mb(cost.peak_bytes), *here]
            lines.append(f"| {' | '.join(shown)} | <= {ASKED_PEAK[backend]:g}x |")
    return lines


def _seconds(measured: Measured) -> list[str]:
    lines = []
    for build in measured.builds:
        lines += ["", f"## Where the seconds of {build.target} go", ""]
        lines += ["From when the student is loaded; rows overlap, since two conversions run side by side.", ""]
        lines += ["| from | seconds | what |", "|---|---|---|"]
        lines += [f"| {at:.1f} | {took:.1f} | {name} |" for name, at, took in build.spans if took >= SHOWN_S]
        ended = max((at + took for _, at, took in build.spans), default=0.0)
        lines.append(
            f"| | {build.command.seconds - ended:.1f} | starting, loading and hashing the student; the bundle |"
        )
    return lines


def _verification(measured: Measured) -> list[str]:
    lines = ["", "## Verification", "", "| target | backend | seconds | peak MB |", "|---|---|---|---|"]
    for build in measured.builds:
        for name, cost in build.stages.items():
            if name.endswith("-verify"):
                backend = name.removesuffix("-verify")
                lines.append(f"| {build.target} | {backend} | {cost.seconds:.1f} | {_mb(cost.peak_bytes)} |")
    return lines


def _lowerings(measured: Measured) -> list[str]:
    lines = ["", "## Lowering alone", "", "One component at a time, nothing beside it; not executed.", ""]
    lines += ["| backend | component | fp32 MB | rewrite s | convert s | converter's peak MB | peak / fp32 | asked |"]
    lines[-1] += " peak of the command MB | artifact MB |"
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for backend, parts in measured.lowerings.items():
        for component, one in parts.items():
            size = 4 * measured.parameters[component]
            if one.refused is not None:
                lines.append(f"| {backend} | {component} | {_mb(size)} | refused: {one.refused} | | | | | | |")
                continue
            ratio = f"{one.child_peak_bytes / size:.1f}x" if size >= SMALL else ""
            shown = [backend, component, _mb(size), f"{one.rewrite_seconds:.1f}", f"{one.convert_seconds:.1f}"]
            shown += [_mb(one.child_peak_bytes), ratio, f"<= {ASKED_PEAK[backend]:g}x", _mb(one.peak_bytes)]
            shown += [_mb(one.artifact_bytes) + ("" if one.parts == 1 else f" in {one.parts} parts")]
            lines.append(f"| {' | '.join(shown)} |")
    return lines


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f}"
