"""Which passes a build runs: the presets, and what the user changed about them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from edgegen.errors import UsageError
from edgegen.rewrite.base import Pass
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.presets import canonical
from edgegen.rewrite.registry import get_pass, parse


class Edits:
    """`--passes`: entries from left to right; `none` empties the presets, `-name` takes one pass out, `name{...}` takes
    the place of the pass of that name or joins the end of the target's pipeline."""

    def __init__(self, text: str | None) -> None:
        """UsageError for a name that no pass has, or text that cannot be read."""
        self.cleared = False
        self.removed: set[str] = set()
        self.added: dict[str, Pass] = {}
        for entry in _entries(text or ""):
            if entry == "none":
                self.cleared, self.removed, self.added = True, set(), {}
            elif entry.startswith("-"):
                self.removed.add(get_pass(entry[1:]).name)
            else:
                self.added |= {one.name: one for one in parse(entry)}

    def canonical(self, preset: Sequence[Pass]) -> Pipeline:
        """The preset with what the edits change in it."""
        return Pipeline(self._kept(preset))

    def shape(self, preset: Sequence[Pass], canonical_preset: Sequence[Pass]) -> Pipeline:
        """As `canonical`, with every added pass that is in neither preset at the end."""
        placed = set() if self.cleared else {one.name for one in (*preset, *canonical_preset)}
        return Pipeline((*self._kept(preset), *(one for name, one in self.added.items() if name not in placed)))

    def _kept(self, preset: Sequence[Pass]) -> tuple[Pass, ...]:
        if self.cleared:
            return ()
        return tuple(self.added.get(one.name, one) for one in preset if one.name not in self.removed)


def canonical_preset(component: str, timesteps: Sequence[float]) -> tuple[Pass, ...]:
    """What every target gets; only the denoiser is called with a time."""
    return canonical.passes(timesteps if component == "denoiser" else ())


def shape_preset(backend: str) -> tuple[Pass, ...]:
    """What the runtime behind `backend` wants; nothing for a backend without a preset."""
    module = f"edgegen.rewrite.presets.{backend}"
    passes: tuple[Pass, ...] = import_module(module).passes() if find_spec(module) else ()
    return passes


def _entries(text: str) -> list[str]:
    """Split at commas outside braces, brackets and quotes."""
    entries, depth, quoted, start = [], 0, False, 0
    for place, letter in enumerate(text):
        if letter == '"':
            quoted = not quoted
        elif not quoted and letter in "{[":
            depth += 1
        elif not quoted and letter in "}]":
            depth -= 1
        elif not quoted and letter == "," and depth == 0:
            entries.append(text[start:place].strip())
            start = place + 1
    entries.append(text[start:].strip())
    if text and not all(entries):
        raise UsageError("`--passes` has an empty name between commas", hint="edgegen passes list")
    return [entry for entry in entries if entry]
