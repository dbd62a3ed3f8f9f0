"""States of a Core ML program: buffers of a graph that a call changes, kept from one call to the next (iOS 18).

Before, as `torch.export` has it, and after, in the program:

    %new = add(%b_sum, %x)                  %old = read_state(input=%sum)
    return (%y), mutates sum <- %new        %new = add(%old, %x); write_state(input=%sum, data=%new)

coremltools makes a state of each such buffer. What it does not say is said here: a state is float16 whatever the buffer
is (so a loop rounds once a call where torch does not), begins as zeros, and belongs to one loaded function: what one
function of a package keeps, another cannot read (`MLModel.makeState`, `MLState`). An app passes such values itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgegen.errors import EdgegenError, UsageError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FIRST_TARGET = "iOS18"


def state_names(program: ExportedProgram) -> tuple[str, ...]:
    """The buffers that a call of `program` (decomposed) changes, by the names that they have as states."""
    return tuple(name.replace(".", "_") for name in _changed(program))


def check_states(program: ExportedProgram, component: str, knows_states: bool, target: str) -> None:
    """Refuse what a state cannot hold, before `program` (decomposed) is converted.

    UsageError for a `target` before iOS 18; EdgegenError for a buffer that is no floating-point tensor or does not
    begin as zeros, and for an input that a call changes.
    """
    signature = program.graph_signature
    changed_inputs = list(signature.user_inputs_to_mutate.values())
    if changed_inputs:
        raise EdgegenError(f"`{component}` changes its input `{changed_inputs[0]}`; only a buffer can become a state")
    buffers = {**program.state_dict, **program.constants}
    for name in _changed(program):
        if not knows_states:
            raise UsageError(
                f"`{component}` keeps `{name}` between calls, and states came with iOS 18: {target} has none",
                hint=f"raise `minimum_deployment_target` of the target to {FIRST_TARGET}",
            )
        value = buffers[name]
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise EdgegenError(f"`{component}` keeps `{name}` between calls as {kind}; a state is float16")
        if torch.count_nonzero(value):
            raise EdgegenError(f"`{component}` keeps `{name}`, which does not begin as zeros; a state does")


def state_details(program: ExportedProgram) -> dict[str, str]:
    """For `Lowered.details`; nothing for a graph without states."""
    names = state_names(program)
    return {"states": ", ".join(names)} if names else {}


def state_notes(program: ExportedProgram) -> tuple[str, ...]:
    """For `Lowered.notes`."""
    names = ", ".join(f"`{name}`" for name in state_names(program))
    return (f"kept between calls as float16, from zeros on: {names}",) if names else ()


def _changed(program: ExportedProgram) -> tuple[str, ...]:
    """Names of buffers, in the order of the graph's inputs."""
    changed = set(program.graph_signature.buffers_to_mutate.values())
    return tuple(name for name in program.graph_signature.inputs_to_buffers.values() if name in changed)
