"""What a student computes under a plan, in torch: the one reference that every backend's artifacts are held against.

The reference runs on the canonical graphs, so it is the same for all backends, and adds in whole numbers, as they do
(`edgegen.precision.integers`). What is float between its codes a backend sums in another order, which moves single
codes, and what one moved code changes is rounded anew by every op behind it: in a deep graph of norms and attentions
two realisations of one plan differ by about as much as each does from float, or a few dB less. Without those they are
the same to the bit, or nearly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor
from edgegen.lower.backend import Array
from edgegen.precision.integers import evaluate_integers
from edgegen.precision.plan import ComponentPlan
from edgegen.precision.quantize import quantized
from edgegen.precision.sites import resolve
from edgegen.verify.trajectory import Sample


def fake_quantized(program: ExportedProgram, plan: ComponentPlan) -> ExportedProgram:
    """The canonical graph `program` as `plan` computes it, between its quantized ops in float32."""
    return quantized(program, resolve(program, plan, program))


def fake_quant_reference(
    programs: Mapping[str, ExportedProgram],
    plans: Mapping[str, ComponentPlan],
    samples: Mapping[str, Sequence[Sample]],
    *,
    moved: bool = False,
    half: bool = False,
) -> dict[str, tuple[Sample, ...]]:
    """`samples` of each component with the outputs that its plan gives on their inputs.

    `programs` are the canonical graphs that the plans were made on. A component without a plan, or with nothing
    compressed in it, keeps its samples. `moved`: with every float weight a millionth off, which says how well the plan
    defines its own numbers; `half`: with what is float between its codes rounded to float16, as devices have it.
    EdgegenError when an output is not finite, in float32.
    """
    return {name: _of_component(name, programs, plans.get(name), found, moved, half) for name, found in samples.items()}


def _of_component(
    name: str,
    programs: Mapping[str, ExportedProgram],
    plan: ComponentPlan | None,
    samples: Sequence[Sample],
    moved: bool,
    half: bool,
) -> tuple[Sample, ...]:
    if plan is None or not plan.compressed:
        return tuple(samples)
    program = fake_quantized(programs[name], plan)
    if moved:
        program = _moved(program)
    return tuple(replace(sample, outputs=_outputs(name, program, sample, half)) for sample in samples)


def _moved(program: ExportedProgram) -> ExportedProgram:
    """`program` with its float weights moved at random by a part in 2^20 each, but for scales."""
    editor = Editor(program, "move")
    generator = torch.Generator().manual_seed(0)
    for node in program.graph.nodes:
        value = editor.value(node)
        if value is None or not value.is_floating_point() or any(_scales(user) for user in node.users):
            continue
        noise = torch.randn(value.shape, generator=generator)
        mine = next(one for one in editor.graph.nodes if one.name == node.name)
        editor.set_weight(mine, (value.double() * (1 + noise * 2.0**-20)).to(value.dtype))
    return editor.finish()


def _scales(user: Node) -> bool:
    return getattr(user.target, "namespace", "") == "quantized_decomposed"


def _outputs(name: str, program: ExportedProgram, sample: Sample, half: bool) -> dict[str, Array]:
    given = {key: torch.from_numpy(np.array(value)) for key, value in sample.inputs.items()}
    values = [value.numpy() for value in evaluate_integers(program, given, half=half)]
    if not half and not all(np.isfinite(value).all() for value in values):
        raise EdgegenError(
            f"`{name}` under its plan gives NaN or infinity on {sample.label}", hint="make the plan again"
        )
    return dict(zip(sample.outputs, values, strict=True))
