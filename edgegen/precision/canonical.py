"""The graphs that plans are made and read on: what every backend's graph of a planned build starts from."""

from __future__ import annotations

from collections.abc import Sequence

from torch.export import ExportedProgram

from edgegen.graph.capture import capture
from edgegen.rewrite.base import Pass
from edgegen.rewrite.choose import canonical_preset, shape_preset
from edgegen.rewrite.fold_attention_scale import FoldAttentionScale
from edgegen.rewrite.fold_bias_add import FoldBiasAdd
from edgegen.rewrite.fold_norm_affine import FoldNormAffine
from edgegen.rewrite.merge_repeated_cat import MergeRepeatedCat
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.split_chunked_linear import SplitChunkedLinear
from edgegen.rewrite.upsample_to_pixel_shuffle import UpsampleToPixelShuffle
from edgegen.students.student import Student


def canonical_passes(component: str, timesteps: Sequence[float], backends: Sequence[str] = ()) -> Pipeline:
    """What every backend's graph of a planned build has gone through: the canonical preset, and those passes of
    targets' presets that change what ops read, give or weigh: ranges and codes are then the same in every backend's
    graph.

    The scale of an attention is one of them: what it multiplies has other codes. So are the phases of an upsampling
    convolution, whose weights are sums: where one of a plan's `backends` wants them all have them, and none otherwise,
    since they are 16/9 of the bytes.
    """
    preset = canonical_preset(component, timesteps)
    names = {one.name for one in preset}
    wanted: tuple[Pass, ...] = (
        MergeRepeatedCat(),
        SplitChunkedLinear(),
        FoldNormAffine(),
        FoldBiasAdd(),
        FoldAttentionScale(),
    )
    phases = UpsampleToPixelShuffle()
    if any(one.name == phases.name for name in backends for one in shape_preset(name)):
        wanted = (*wanted, phases)
    return Pipeline((*preset, *(one for one in wanted if one.name not in names)))


def canonical_programs(student: Student, backends: Sequence[str] = ()) -> dict[str, ExportedProgram]:
    """The graph of each component that plans for `backends` are made and read on."""
    timesteps = timesteps_of(student)
    return {
        name: canonical_passes(name, timesteps, backends).run(capture(part))[0]
        for name, part in student.components.items()
    }


def timesteps_of(student: Student) -> tuple[float, ...]:
    """At which its denoiser is called."""
    sampler = student.config.sampler
    return () if sampler is None else sampler.timesteps()
