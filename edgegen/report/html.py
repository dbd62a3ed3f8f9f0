"""`report.html`: one self-contained page that a person can read offline. Imports no torch.

Everything that comes from outside (prompts, op names, notes, file names) is escaped by jinja2, and the page's own
Content-Security-Policy forbids scripts and requests altogether.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgegen.bundle.manifest import Artifact, Manifest, stored_bytes
from edgegen.profile.host import Host, ProfileReport
from edgegen.report.front import draw_front
from edgegen.report.levels import figures
from edgegen.report.rewrites import Rewrites, rewrites_by_backend
from edgegen.verify.gates import decibels, describe_delegation, sensitivity_met
from edgegen.verify.outcome import ComponentParity, Outcome, ParityReport, SensitivityStep
from edgegen.verify.trajectory import Picture

PictureRow = tuple[str, Picture, Mapping[str, Picture]]
"""What was asked, what the student drew, and what each backend's artifacts drew."""

WIDEST = 2048
"""Pixels of a picture in the page."""
METER_DB = 160.0
"""Full length of a meter; fp32 against fp32 seldom agrees to more."""

Tone = Literal["ok", "bad", "warn"]


@dataclass(frozen=True)
class Verdict:
    """The line on top."""

    tone: Tone
    headline: str
    detail: str


@dataclass(frozen=True)
class Tile:
    """One number worth a glance."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class SensitivityRow:
    """One backend's worst case over pairs of prompts, step by step."""

    backend: str
    cells: tuple[str, ...]
    met: bool
    worst: str


def render(
    manifest: Manifest,
    parity: Mapping[str, ParityReport],
    profile: Mapping[str, ProfileReport],
    pictures: Sequence[PictureRow],
    logs: Sequence[str] = (),
    rewrites: Rewrites | None = None,
) -> str:
    """The page. `pictures` are uint8 [H, W, 3]; `logs` are names of files in the bundle's `reports/`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "db": decibels,
        "size": human_size,
        "stored_bytes": stored_bytes,
        "ms": human_ms,
        "meter": _meter,
        "delegation": describe_delegation,
        "png": png_data_uri,
        "tone": _tone,
        "figures": figures,
    }
    backends = [*parity, *(one.backend for one in manifest.artifacts if one.backend not in parity)]
    return environment.get_template("report.html.j2").render(
        manifest=manifest,
        parity=parity,
        profile={name: one for name, one in profile.items() if one.not_measured_because is None},
        hosts=_hosts(profile),
        pictures=pictures,
        film=manifest.task == "image-to-video",
        psnr=_psnr_by_row(parity, pictures),
        backends=list(dict.fromkeys(backends)),
        artifacts=_by_backend(manifest),
        verdict=verdict(manifest, parity),
        tiles=_tiles(manifest, parity, profile),
        sensitivity=[row for name, one in parity.items() if (row := _sensitivity_row(name, one)) is not None],
        declined=_declined(manifest, parity, profile),
        front=None if manifest.plan is None else draw_front(manifest.plan.front),
        logs=sorted(logs),
        rewrites=rewrites_by_backend(rewrites or {}),
    )


def verdict(manifest: Manifest, parity: Mapping[str, ParityReport]) -> Verdict:
    """One line that is true: what was not met first, then what was not executed, and only then what passed."""
    thing = {"single": "outputs", "image-to-video": "videos"}.get(manifest.task, "pictures")
    failed = [(name, gate) for name, report in parity.items() for gate in report.failed]
    if failed:
        count = "1 gate was not met" if len(failed) == 1 else f"{len(failed)} gates were not met"
        shown = [f"{name}: {gate.gate} of {gate.subject} is {gate.measured}" for name, gate in failed[:3]]
        more = f", and {len(failed) - 3} more below" if len(failed) > 3 else ""
        return Verdict("bad", count, "; ".join(shown) + more)
    passed = [name for name, report in parity.items() if report.passed]
    absent = [name for name, report in parity.items() if not report.passed]
    elsewhere = f" Not executed on this machine, so not proven here: {', '.join(absent)}." if absent else ""
    if not passed:
        return Verdict("warn", "Built, and not proven on this machine", elsewhere.strip() or "Nothing was executed.")
    ran = f"{len(passed)} of {len(parity)} {'backend' if len(parity) == 1 else 'backends'}"
    stood_in = [f"{name} by {parity[name].executed_by}" for name in passed if parity[name].executed_by is not None]
    by = f" Executed here: {'; '.join(stood_in)}." if stood_in else ""
    detail = f"{ran} ran on this machine and met every gate: {', '.join(passed)}.{by}{elsewhere}"
    return Verdict("ok", f"The compiled {thing} match the student", detail)


def png_data_uri(picture: Picture) -> str:
    """uint8 [H, W, 3] -> `data:image/png;base64,...` at its own size, which the page scales without smoothing; wider
    ones (strips of a video's frames) are made `WIDEST` pixels wide."""
    from PIL import Image

    buffer = io.BytesIO()
    shown = Image.fromarray(picture)
    if shown.width > WIDEST:
        shown = shown.resize((WIDEST, max(1, shown.height * WIDEST // shown.width)), Image.Resampling.LANCZOS)
    shown.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def human_size(count: int) -> str:
    """`870 B`, `12.4 kB`, `8.3 MB`, `1.2 GB`: decimal, as app stores and file managers count."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def human_ms(value: float) -> str:
    """Milliseconds with three figures, seconds from one second on."""
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def _meter(value: float | None) -> str:
    """A share of the meter, as CSS wants it."""
    if value is None or math.isnan(value):
        return "0"
    return f"{min(max(value / METER_DB, 0.0), 1.0):.4f}"


def _tone(part: ComponentParity | ParityReport) -> Tone:
    if isinstance(part, ParityReport):
        return {"passed": "ok", "failed": "bad", "not_executed": "warn"}[part.status]  # type: ignore[return-value]
    if part.outcome is Outcome.SUCCESS:
        return "ok"
    return "warn" if part.outcome in (Outcome.NOT_EXECUTED, Outcome.UNDELEGATED) else "bad"


def _by_backend(manifest: Manifest) -> dict[str, list[Artifact]]:
    found: dict[str, list[Artifact]] = {}
    for artifact in manifest.artifacts:
        found.setdefault(artifact.backend, []).append(artifact)
    return found


def _psnr_by_row(parity: Mapping[str, ParityReport], pictures: Sequence[PictureRow]) -> list[dict[str, str]]:
    """Picture PSNR under each picture; rows and reports are in the order of the reference's trajectories."""
    rows: list[dict[str, str]] = [{} for _ in pictures]
    for name, report in parity.items():
        if len(report.pictures) == len(rows):
            for row, one in zip(rows, report.pictures, strict=True):
                row[name] = decibels(one.psnr_db)
    return rows


def _hosts(profile: Mapping[str, ProfileReport]) -> list[Host]:
    """Each host once; the load average differs from backend to backend, the highest is shown."""
    found: dict[str, Host] = {}
    for report in profile.values():
        host = report.measured_on
        key = host.model_copy(update={"load_average": None}).model_dump_json()
        known = found.get(key)
        if known is None or (host.load_average or 0.0) > (known.load_average or 0.0):
            found[key] = host
    return list(found.values())


def _tiles(manifest: Manifest, parity: Mapping[str, ParityReport], profile: Mapping[str, ProfileReport]) -> list[Tile]:
    tiles = []
    psnr = [(report.worst_psnr_db, name) for name, report in parity.items() if report.worst_psnr_db is not None]
    if psnr:
        value, name = min(psnr)
        worst = "Worst frame" if manifest.task == "image-to-video" else "Worst picture"
        tiles.append(Tile(worst, decibels(value), f"PSNR against the student, {name}"))
    sqnr = [(report.worst_sqnr_db, name) for name, report in parity.items() if report.worst_sqnr_db is not None]
    if sqnr:
        value, name = min(sqnr)
        tiles.append(Tile("Worst component", decibels(value), f"SQNR, {name}"))
    moves = [(step, name) for name, report in parity.items() if (step := report.worst_sensitivity) is not None]
    if moves:
        step, name = max(moves, key=lambda found: _deviation(found[0]))
        off = _deviation(step)
        text = f"{off:.2%} off" if math.isfinite(off) else "not finite"
        what = "Prompt" if manifest.task == "text-to-image" else "Picture"
        tiles.append(Tile(f"{what} sensitivity", text, f"worst step, {name}"))
    drawn = [(one.picture.median_ms, one) for one in profile.values() if one.picture is not None]
    if drawn:
        taken, one = min(drawn, key=lambda found: found[0])
        tiles.append(
            Tile(
                f"Fastest {'video' if manifest.task == 'image-to-video' else 'picture'} here",
                human_ms(taken),
                f"{one.backend}, {_steps(one.picture_steps)}, measured",
            )
        )
    sizes = {name: stored_bytes(parts) for name, parts in _by_backend(manifest).items()}
    if sizes:
        name = min(sizes, key=lambda key: sizes[key])
        tiles.append(Tile("Smallest", human_size(sizes[name]), f"all components, {name}"))
    return tiles


def _steps(count: int | None) -> str:
    return "steps unknown" if count is None else "1 step" if count == 1 else f"{count} steps"


def _deviation(step: SensitivityStep) -> float:
    if step.ratio is None or step.cosine is None:
        return math.inf
    return max(abs(step.ratio - 1.0), 1.0 / step.cosine - 1.0 if step.cosine > 0 else math.inf)


def _sensitivity_row(name: str, report: ParityReport) -> SensitivityRow | None:
    if not report.sensitivity:
        return None
    tolerance, sqnr = report.gates.sensitivity_tolerance, report.gates.sqnr_db[report.precision]
    cells = []
    for index in range(1, max(step.step for step in report.sensitivity) + 1):
        here = [step for step in report.sensitivity if step.step == index]
        ratios = [step.ratio for step in here if step.ratio is not None]
        if any(step.ratio is None and not step.degenerate for step in here):
            cells.append("not finite")
        elif not ratios:
            cells.append("the student ignores the prompt")
        else:
            low, high = f"{min(ratios):.4f}", f"{max(ratios):.4f}"
            cells.append(low if low == high else f"{low} – {high}")
    met = all(sensitivity_met(step, tolerance, sqnr) for step in report.sensitivity)
    furthest = report.worst_sensitivity
    worst = "" if furthest is None else f"step {furthest.step}: “{furthest.prompt_a}” against “{furthest.prompt_b}”"
    return SensitivityRow(name, tuple(cells), met, worst)


def _declined(
    manifest: Manifest, parity: Mapping[str, ParityReport], profile: Mapping[str, ProfileReport]
) -> list[tuple[str, str]]:
    """(what, why) without repetition, in the order: not executed, not measured, not built, done differently."""
    found: dict[tuple[str, str], None] = {}
    for name, report in parity.items():
        for part in report.components:
            if part.outcome is Outcome.NOT_EXECUTED:
                found[(f"{name}: not executed here", part.reason or "no reason was given")] = None
        if report.executed_by is not None:
            found[(f"{name}: executed here", f"by {report.executed_by}")] = None
        for note in report.notes:
            found[(f"{name}: verification", note)] = None
    for name, measured in profile.items():
        if measured.not_measured_because is not None:
            found[(f"{name}: not measured here", measured.not_measured_because)] = None
    for artifact in manifest.artifacts:
        if artifact.not_executed_because is not None and artifact.backend not in parity:
            found[(f"{artifact.backend}: not executed here", artifact.not_executed_because)] = None
    for name, reason in manifest.declined.items():
        found[(f"{name}: not built", reason)] = None
    for artifact in manifest.artifacts:
        for note in artifact.notes:
            found[(f"{artifact.backend}, {artifact.component}", note)] = None
    return list(found)
