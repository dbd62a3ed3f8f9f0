"""Rewrites that are right for every target: what follows meets fewer shapes of graph."""

from __future__ import annotations

from collections.abc import Sequence

from edgegen.rewrite.base import Pass
from edgegen.rewrite.drop_dead_guidance import DropDeadGuidance
from edgegen.rewrite.drop_unused_inputs import DropUnusedInputs
from edgegen.rewrite.float_literals import FloatLiterals
from edgegen.rewrite.fold_batch_norm import FoldBatchNorm
from edgegen.rewrite.fold_constants import FoldConstants
from edgegen.rewrite.functionalise import Functionalise
from edgegen.rewrite.merge_common import MergeCommon
from edgegen.rewrite.merge_low_rank_adapters import MergeLowRankAdapters
from edgegen.rewrite.remove_broadcasts import RemoveBroadcasts
from edgegen.rewrite.remove_identities import RemoveIdentities
from edgegen.rewrite.simplify_arithmetic import SimplifyArithmetic
from edgegen.rewrite.specialise_timestep import SpecialiseTimestep


def passes(timesteps: Sequence[float] = ()) -> tuple[Pass, ...]:
    """In order; `timesteps` are those at which a sampler calls this component, none for a component without time."""
    time = (SpecialiseTimestep(tuple(timesteps)),) if timesteps else ()
    return (
        Functionalise(),
        RemoveIdentities(),
        FloatLiterals(),
        *time,
        FoldConstants(),
        DropDeadGuidance(),
        MergeLowRankAdapters(),
        FoldBatchNorm(),
        SimplifyArithmetic(),
        RemoveBroadcasts(),
        MergeCommon(),
        DropUnusedInputs(),
    )
