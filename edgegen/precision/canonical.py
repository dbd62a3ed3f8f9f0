"""The graphs that plans are made and read on: what every backend's graph of a planned build starts from."""

from __future__ import annotations

from collections.abc import Sequence

from torch.export import ExportedProgram

from edgegen.graph.capture import capture
from edgegen.rewrite.choose import canonical_preset
from edgegen.rewrite.fold_bias_add import FoldBiasAdd
from edgegen.rewrite.fold_norm_affine import FoldNormAffine
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.split_chunked_linear import SplitChunkedLinear
from edgegen.students.student import Student


def canonical_passes(component: str, timesteps: Sequence[float]) -> Pipeline:
    """What every backend's graph of a planned build has gone through: the canonical preset, and those passes of
    targets' presets that change what ops read and give: ranges and codes are then the same in every backend's graph."""
    preset = canonical_preset(component, timesteps)
    names = {one.name for one in preset}
    return Pipeline(
        (*preset, *(one for one in (SplitChunkedLinear(), FoldNormAffine(), FoldBiasAdd()) if one.name not in names))
    )


def canonical_programs(student: Student) -> dict[str, ExportedProgram]:
    """The graph of each component that plans are made and read on."""
    timesteps = timesteps_of(student)
    return {name: canonical_passes(name, timesteps).run(capture(part))[0] for name, part in student.components.items()}


def timesteps_of(student: Student) -> tuple[float, ...]:
    """At which its denoiser is called."""
    sampler = student.config.sampler
    return () if sampler is None else sampler.timesteps()
