"""Which of a bundle's backends draws on this machine. Imports no torch."""

from __future__ import annotations

from edgegen.bundle.open import Bundle
from edgegen.errors import UsageError
from edgegen.lower.backend import BACKENDS, get_backend
from edgegen.lower.requirements import missing_modules
from edgegen.lower.stand_in import executed_by


def choose_backend(bundle: Bundle, wanted: str | None = None) -> str:
    """The first backend of the target's order whose runtime is here, or `wanted` and no other.

    Where no runtime is, the first that something else executes here (see `edgegen.lower.stand_in`). UsageError when
    there is none, with the reason for each.
    """
    have = bundle.backends()
    if wanted is not None:
        if wanted not in have:
            if wanted not in BACKENDS:
                get_backend(wanted)  # raises with the list of those that exist
            hint = " or ".join(f"`--backend {name}`" for name in have) or "build it with the backend that you need"
            why = bundle.manifest.declined.get(wanted)
            raise UsageError(
                f"bundle `{bundle.root}` has no complete set of artifacts for `{wanted}`" + (f": {why}" if why else ""),
                hint=f"use {hint}" if have else hint,
            )
        have = (wanted,)
    reasons: list[str] = []
    stand_in: str | None = None
    install: str | None = None
    for name in have:
        if name not in BACKENDS:
            reasons.append(f"`{name}` is not known to this edgegen")
            continue
        candidate = get_backend(name)
        reason = candidate.not_executed_here()
        missing = missing_modules(candidate, "run")
        if reason is None and not missing:
            if executed_by(candidate) is None:
                return name
            stand_in = stand_in or name
            continue
        if reason is None:
            reason = "not installed: " + ", ".join(f"`{module}`" for module in missing)
            install = install or f"pip install 'edgegen[{candidate.extra}]'"
        reasons.append(f"`{name}`: {reason}")
    if stand_in is not None:
        return stand_in
    said = "; ".join(reasons) or "no backend has all of its components"
    raise UsageError(
        f"bundle `{bundle.root}` cannot be executed here: {said}",
        hint=install or "build for this machine too: `edgegen build --target linux-x86 MODEL`",
    )
