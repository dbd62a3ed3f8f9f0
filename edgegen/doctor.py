"""What is installed, held against the set that was tested together; imports none of what it looks at."""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from edgegen import __version__
from edgegen.errors import EdgegenError

State = Literal["ok", "differs", "unsupported", "missing"]
"""`ok`: the tested version; `differs`: another one within our range; `unsupported`: outside it; `missing`."""

ENABLES = {
    "coreml": "`.mlpackage` for iPhone and iPad: made on any host, executed on macOS (elsewhere by an evaluator)",
    "coreai": "`.aimodel` for iOS and iPadOS 27: made and checked on Linux x86-64 and macOS",
    "executorch": "`.pte` for phones and boards (XNNPACK): made and executed here",
    "tflite": "`.tflite` for Android, boards and browsers: made and executed here",
    "onnx": "`.onnx` for Linux, Jetson and browsers: made and executed here",
    "diffusers": "students kept as a diffusers folder",
    "video": "`.mp4` of students that draw videos; `.gif` and `.webp` need nothing",
    "devices": "libraries for adb and ssh; no command of this version uses them yet",
    "train": "training the `shapes` student again",
    "dev": "the test suite, type checks and lint",
}
"""What each extra of pyproject.toml brings, in the order in which `doctor` shows them."""
SUPPORTED_PYTHON = ((3, 11), (3, 14))
"""From the first, below the second."""


@dataclass(frozen=True)
class Requirement:
    """One line of our dependencies: `specifier` as in pyproject.toml, `extra` None for the core."""

    name: str
    specifier: str
    extra: str | None


@dataclass(frozen=True)
class Package:
    name: str
    required: str
    installed: str | None
    tested: str | None
    state: State


@dataclass(frozen=True)
class Part:
    """The core or an extra. `state` is the worst of its packages'; `hint` is what repairs it."""

    name: str
    enables: str
    packages: tuple[Package, ...]
    state: State
    hint: str | None


@dataclass(frozen=True)
class Report:
    edgegen: str
    python: str
    python_supported: bool
    platform: str
    core: Part
    extras: tuple[Part, ...]

    @property
    def core_works(self) -> bool:
        return self.python_supported and self.core.state in ("ok", "differs")


def examine() -> Report:
    """Look at this interpreter's distributions; EdgegenError when edgegen's own description cannot be found."""
    tested = tested_versions()
    required = requirements()
    core = _part("core", "every command", [r for r in required if r.extra is None], tested)
    extras = tuple(
        _part(extra, enables, [r for r in required if r.extra == extra], tested) for extra, enables in ENABLES.items()
    )
    low, high = SUPPORTED_PYTHON
    return Report(
        edgegen=__version__,
        python=platform.python_version(),
        python_supported=low <= sys.version_info[:2] < high,
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        core=core,
        extras=extras,
    )


def tested_versions() -> dict[str, str]:
    """Distribution (normalised) -> version, from `constraints.txt`."""
    package = Path(__file__).parent
    for path in (package / "_data" / "constraints.txt", package.parent / "constraints.txt"):
        if path.is_file():
            lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
            pairs = (line.partition("==") for line in lines if line)
            return {normalise(name): version for name, _, version in pairs}
    raise EdgegenError(
        "`constraints.txt` is missing from the installation", hint="pip install --force-reinstall edgegen"
    )


def requirements() -> tuple[Requirement, ...]:
    """Our own dependencies: of the installed distribution, or of the checkout that this runs from."""
    project = _checkout()
    if project is not None:  # nearer the truth than an editable install's metadata, which ages
        found = [_parse(line, None) for line in project["dependencies"]]
        for extra, lines in project["optional-dependencies"].items():
            found += [_parse(line, extra) for line in lines]
    else:
        try:
            lines = metadata.requires("edgegen") or []
        except metadata.PackageNotFoundError as error:
            raise EdgegenError("edgegen is not installed as a package", hint="pip install edgegen") from error
        found = [_parse(line, None) for line in lines]
    return tuple(requirement for requirement in found if requirement.name != "edgegen")


def _checkout() -> dict[str, Any] | None:
    """Our own `[project]`, when this runs from a checkout."""
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    if not pyproject.is_file():
        return None
    project: dict[str, Any] = tomllib.loads(pyproject.read_text()).get("project", {})
    return project if project.get("name") == "edgegen" else None


def _parse(line: str, extra: str | None) -> Requirement:
    what, _, marker = line.partition(";")
    named = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)(\[[^\]]*\])?\s*(.*?)\s*$", what)
    if match is None:
        raise EdgegenError(f"dependency `{line}` cannot be read", hint="pip install --force-reinstall edgegen")
    return Requirement(normalise(match[1]), match[3].strip("()"), named[1] if named else extra)


def _part(name: str, enables: str, required: list[Requirement], tested: Mapping[str, str]) -> Part:
    packages = tuple(_package(requirement, tested.get(requirement.name)) for requirement in required)
    worst: tuple[State, ...] = ("missing", "unsupported", "differs", "ok")
    state: State = next((state for state in worst if any(package.state == state for package in packages)), "ok")
    hint = None
    if state in ("unsupported", "missing"):
        hint = "pip install edgegen" if name == "core" else f"pip install 'edgegen[{name}]'"
    return Part(name, enables, packages, state, hint)


def _package(requirement: Requirement, tested: str | None) -> Package:
    installed = _installed(requirement.name)
    state: State = "ok"
    if installed is None:
        state = "missing"
    elif not satisfies(installed, requirement.specifier):
        state = "unsupported"
    elif tested is not None and public(installed) != tested:
        state = "differs"
    return Package(requirement.name, requirement.specifier, installed, tested, state)


def _installed(name: str) -> str | None:
    try:
        found: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    return found or None  # metadata without a version is what an interrupted pip leaves


def normalise(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def public(version: str) -> str:
    """Without the local part: a CPU build `2.13.0+cpu` is release 2.13.0 (PEP 440)."""
    return version.partition("+")[0]


def satisfies(version: str, specifier: str) -> bool:
    """Whether `version` meets clauses of `>=`, `<` and `==`, the only ones that we use; release numbers alone count."""
    for clause in filter(None, (part.strip() for part in specifier.split(","))):
        match = re.fullmatch(r"(>=|<|==)\s*(\S+)", clause)
        if match is None:
            raise EdgegenError(f"specifier `{clause}` cannot be read", hint="pip install --force-reinstall edgegen")
        if match[1] == "==":
            met = public(version) == match[2]
        elif match[1] == ">=":
            met = _release(version) >= _release(match[2])
        else:
            met = _release(version) < _release(match[2])
        if not met:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)", version)
    numbers = [int(number) for number in match[1].split(".")] if match else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
