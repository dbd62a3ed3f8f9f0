"""What the int8 benchmarks compare: artifacts that can be called, those that failed, and the table they are put in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from subjects import Inputs, Subject

from edgegen.lower.backend import Array, LowerRequest, get_backend


@dataclass(frozen=True)
class Made:
    """One artifact and how it is called; `seconds` of quantizing and of lowering, where these are two things."""

    row: str
    path: Path
    run: Callable[[Inputs], Array]
    quantizing_s: float = 0.0
    lowering_s: float = 0.0
    note: str = ""
    prepare: Callable[[Inputs], Callable[[], object]] | None = None
    """A call of these inputs alone that gives nothing back, where `run` does more than what is to be timed."""

    def timed(self, given: Inputs) -> Callable[[], object]:
        return self.prepare(given) if self.prepare is not None else lambda: self.run(given)


@dataclass(frozen=True)
class Failed:
    """An artifact that could not be made or run, or was not asked for."""

    row: str
    why: str


def first_line(error: Exception) -> str:
    """Of what a tool says when it fails."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    parts = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in parts)


class Row(BaseModel):
    """One artifact of one network on one runtime; `to_fp32` and `ms` were measured in turns with the others."""

    model: str
    backend: str
    row: str
    megabytes: float | None = None
    sqnr_db: float | None = None
    """Against the network in torch fp32, over all held-out inputs together."""
    ms: float | None = None
    to_fp32: float | None = None
    quantizing_s: float | None = None
    lowering_s: float | None = None
    note: str = ""


def runner(subject: Subject, backend: str, path: Path, request: LowerRequest) -> Callable[[Inputs], Array]:
    """A call of an artifact of ours, by the names of the network's own inputs."""
    executable = get_backend(backend).load(path, request.inputs, request.outputs)
    name = request.outputs[0].name

    def run(given: Inputs) -> Array:
        inputs = subject.as_rewritten(given)
        return executable({spec.name: inputs[spec.name].numpy() for spec in request.inputs})[name]

    return run


def joined(arrays: list[Array]) -> Array:
    return torch.stack([torch.from_numpy(one) for one in arrays]).numpy()


_COLUMNS = {
    "megabytes": "MB",
    "sqnr_db": "SQNR dB",
    "ms": "ms",
    "to_fp32": "to plain fp32",
    "quantizing_s": "quantizing s",
    "lowering_s": "lowering s",
    "note": "note",
}


def _cells(row: Row) -> list[str]:
    values = row.model_dump()
    return ["-" if values[name] is None else str(values[name]) for name in _COLUMNS]


def line(row: Row) -> str:
    said = ", ".join(f"{title} {cell}" for title, cell in zip(_COLUMNS.values(), _cells(row), strict=True) if cell)
    return f"{row.model} on {row.backend}, {row.row}: {said}"


def markdown(title: str, settings: dict[str, str], rows: list[Row]) -> str:
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in settings.items())]
    for model, backend in dict.fromkeys((row.model, row.backend) for row in rows):
        lines += ["", f"## {model} on {backend}", "", "| artifact | " + " | ".join(_COLUMNS.values()) + " |"]
        lines.append("|---|" + "---:|" * (len(_COLUMNS) - 1) + "---|")
        for row in rows:
            if (row.model, row.backend) == (model, backend):
                lines.append(f"| {row.row} | " + " | ".join(_cells(row)) + " |")
    return "\n".join(lines) + "\n"
