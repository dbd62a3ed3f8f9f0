"""Whether the libraries of a backend are installed, told before any work starts. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from edgegen.errors import UsageError
from edgegen.lower.backend import Backend


def missing_modules(backend: Backend, half: Literal["lower", "run"]) -> tuple[str, ...]:
    """Modules that `backend` needs to lower (or to run) an artifact and that are not installed, in its order."""
    needed = backend.lower_modules if half == "lower" else backend.run_modules
    return tuple(module for module in needed if not _installed(module))


def _installed(module: str) -> bool:
    # Only the top-level name: finding a submodule's spec imports its parents.
    return find_spec(module.partition(".")[0]) is not None


def require(backend: Backend, half: Literal["lower", "run"]) -> None:
    """UsageError with a `pip install` hint when `backend` cannot lower (or run) for want of a library."""
    missing = missing_modules(backend, half)
    if missing:
        verb = "lower" if half == "lower" else "run"
        names = ", ".join(f"`{module}`" for module in missing)
        raise UsageError(
            f"backend `{backend.name}` cannot {verb}: {names} {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"pip install 'edgegen[{backend.extra}]'",
        )
