"""What a student is asked for, on its way into the denoiser: all outputs of the conditioning component as one tensor.

Experiments with plans move one tensor about, take gradients at it and compare it; only where a denoiser is called does
it matter that some students have several (a context and a pooled vector, say). One output is itself; several are laid
end to end, [1, N] fp32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from edgegen.students.student import DTYPES, Student


def pack(outputs: Sequence[Tensor]) -> Tensor:
    """Outputs of one component as one tensor; differentiable."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([one.flatten(1).float() for one in outputs], dim=1)


def asked(student: Student, packed: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Those of the denoiser's inputs `names` that neither latent nor time are: from what `pack` made of the
    conditioning component's outputs, and the student's scalars [1]."""
    specs = student.conditioning.outputs
    if len(specs) == 1:
        parts = [packed]
    else:
        flat = torch.split(packed, [math.prod(spec.shape[1:]) for spec in specs], dim=1)
        parts = [
            one.reshape(len(packed), *spec.shape[1:]).to(DTYPES[spec.dtype])
            for spec, one in zip(specs, flat, strict=True)
        ]
    found = {spec.name: one for spec, one in zip(specs, parts, strict=True)}
    found |= {name: torch.tensor([value]) for name, value in student.config.conditions.items()}
    return {name: value for name, value in found.items() if name in names}
