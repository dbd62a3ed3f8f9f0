"""The guidance that a distilled network is told as an input: LCM's and SANA-Sprint's, a constant of the student."""

from __future__ import annotations

from edgegen.errors import UsageError
from edgegen.students.student import Student, assemble

SCALE = "guidance_scale"


def with_guidance(student: Student, scale: float) -> Student:
    """`student` whose denoiser is told another guidance than its pipeline's default.

    UsageError where it is told none: guidance without that is two calls a step, which no student here does.
    """
    config = student.config.components.get("denoiser")
    told = None if config is None else getattr(student.components["denoiser"].module, "guidance", None)
    if config is None or told is None or SCALE not in config.config:
        raise UsageError(
            f"the denoiser of `{student.config.name}` is not told a guidance, and classifier-free guidance is not done",
            hint="leave `--guidance` out",
        )
    changed = config.model_copy(update={"config": {**config.config, SCALE: scale}})
    parts = {**student.config.components, "denoiser": changed}
    state = {name: part.module.state_dict() for name, part in student.components.items()}
    return assemble(student.config.model_copy(update={"components": parts}), state, student.tokenizer_json)
