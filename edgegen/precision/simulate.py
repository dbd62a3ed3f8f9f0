"""A student drawn through its graphs with some ops computed in other precisions: what sensitivity is measured on.

Nothing is rewritten here: the calls that an op's precision changes are computed by `Changed` while a graph is
interpreted. It says what `edgegen.precision.quantize` says, at the cost of the float graph, for one op or for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.capture import signature
from edgegen.graph.edit import user_inputs, weights
from edgegen.precision.arithmetic import at_once, by_row, by_tensor, fake_quantized, int32_bias
from edgegen.precision.conditioning import asked, pack
from edgegen.precision.encode import encode_weight
from edgegen.precision.interpret import Steps
from edgegen.precision.plan import OpPlan
from edgegen.precision.repair.q_sched import Factors, applied
from edgegen.precision.sites import Site
from edgegen.students.sample import decoder_input, initial_noise, sampler_table
from edgegen.students.sampler import SamplerStep, moment
from edgegen.students.student import Student


@dataclass(frozen=True)
class Changed:
    """One op in another precision: the value of its call, given the arguments that the float op has."""

    op: OpPlan
    weight: Tensor | None
    """What is left of the weight after compression; None for a matmul."""
    bias: Tensor | None = None
    """Where it is not the float op's."""

    def __call__(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert callable(node.target)
        given = list(args)
        if self.weight is not None:
            given[1] = self.weight
        if self.bias is not None:
            given[2] = self.bias
        if self.op.precision == "w8a8":
            assert self.op.input is not None
            given[0] = fake_quantized(given[0], self.op.input)
            if self.op.op == "matmul":
                assert self.op.other is not None
                given[1] = fake_quantized(given[1], self.op.other)
            made: Tensor = node.target(*given, **kwargs)
            return made if self.op.output is None else fake_quantized(made, self.op.output)
        if self.op.precision == "w8a8-dynamic":
            given[0] = _dynamic(given[0], rows=self.op.op == "linear")
            if self.op.op == "matmul":
                given[1] = _dynamic(given[1], rows=False)
        result: Tensor = node.target(*given, **kwargs)
        return result


def _dynamic(x: Tensor, rows: bool) -> Tensor:
    """`x` through int8 codes of its own range, that of each row along the last axis or of the whole."""
    made: Tensor = (by_row if rows else by_tensor)(at_once, x, x.dtype)
    return made


Observe = Callable[[Node, tuple[Any, ...], dict[str, Any], Tensor], Tensor]
"""(call, its arguments, their keywords, its value) -> the value to go on with."""


@dataclass(frozen=True)
class Network:
    """One component's graph and its sites; `changed` makes, and keeps, what a precision makes of an op."""

    name: str
    program: ExportedProgram
    sites: Mapping[str, Site]
    _weights: dict[str, Tensor] = field(default_factory=dict)
    _encoded: dict[tuple[str, str, str, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    """Decoded, with the scales of what has any."""
    _biases: dict[str, str] = field(default_factory=dict)
    """Call -> the placeholder of its bias."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in signature(self.program))

    def weight(self, key: str) -> Tensor | None:
        """[N, C, ...] of a site, [C, N, ...] of a transposed convolution; None for a matmul."""
        name = self.sites[key].weight
        return None if name is None else self._held()[name]

    def changed(self, key: str, op: OpPlan) -> Changed:
        site = self.sites[key]
        weight, bias = self.weight(key), None
        if weight is not None and op.precision not in ("fp32", "fp16"):
            bits = op.precision[:2]
            known = (key, bits, op.form, op.group)
            if known not in self._encoded:
                encoded = encode_weight(weight, op, site.axis, name=key)
                self._encoded[known] = encoded.decode(), encoded.scales
            weight, scales = self._encoded[known]
            bias = self._bias(key)
            if bias is not None and op.precision == "w8a8":
                assert op.input is not None and scales is not None
                bias = int32_bias(bias, scales, op.input)
        return Changed(op, weight, bias)

    def _bias(self, key: str) -> Tensor | None:
        """Of a site that adds a constant one."""
        if not self._biases:
            for node in self.program.graph.nodes:
                if node.op == "call_function" and len(node.args) > 2 and isinstance(node.args[2], Node):
                    self._biases[node.name] = node.args[2].name
        name = None if self.sites[key].kind == "matmul" else self._biases.get(self.sites[key].node)
        return None if name is None else self._held().get(name)

    def changes(self, ops: Mapping[str, OpPlan]) -> dict[str, Changed]:
        """By the names of calls, of those of `ops` that are more than a float."""
        return {
            self.sites[key].node: self.changed(key, op)
            for key, op in ops.items()
            if op.precision not in ("fp32", "fp16")
        }

    def __call__(
        self, inputs: Mapping[str, Tensor], changed: Mapping[str, Changed] | None = None, observe: Observe | None = None
    ) -> tuple[Tensor, ...]:
        """Outputs, in order. Gradients flow where the inputs ask for them."""
        held: dict[str, Tensor] = {**self._held(), **{n.name: inputs[n.name] for n in user_inputs(self.program)}}
        given = [held[node.name] for node in self.program.graph.nodes if node.op == "placeholder"]
        known = changed or {}

        def compute(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            change = known.get(node.name)
            value = node.target(*args, **kwargs) if change is None else change(node, args, kwargs)  # type: ignore[operator]
            return value if observe is None else observe(node, args, kwargs, value)

        return tuple(self._steps.run(given, compute))

    @cached_property
    def _steps(self) -> Steps:
        return Steps(self.program)

    def _held(self) -> dict[str, Tensor]:
        if not self._weights:
            self._weights.update({name: value.detach() for name, value in weights(self.program).items()})
        return self._weights


Changes = Mapping[str, Mapping[str, Changed]]
"""Component -> call -> how it is computed."""


@dataclass(frozen=True)
class Drawn:
    """One picture with what led to it: `latents[t]` is what step t starts from; [1, ...] fp32."""

    ids: Tensor
    context: Tensor
    table: tuple[SamplerStep, ...]
    latents: tuple[Tensor, ...]
    decoder_input: Tensor
    image: Tensor


@dataclass(frozen=True)
class Drawing:
    """A student that draws, as graphs. What it is asked for is one tensor: see `edgegen.precision.conditioning`."""

    student: Student
    networks: Mapping[str, Network]
    schedule: Mapping[int, Factors] = field(default_factory=dict)
    """Steps -> factors of the sampler's table (Q-Sched)."""

    @property
    def encoder(self) -> str:
        """The component that runs once, before the denoiser."""
        return self.student.conditioning.name

    def denoiser_inputs(self, step: SamplerStep, latent: Tensor, context: Tensor) -> dict[str, Tensor]:
        names = self.networks["denoiser"].inputs
        given = {"latent": step.input_scale * latent, **asked(self.student, context, names)}
        given |= {name: torch.from_numpy(value) for name, value in moment(step, names).items()}
        return given

    @torch.no_grad()
    def draw(
        self, ids: Tensor, seed: int, steps: int, changes: Changes | None = None, known: Drawn | None = None
    ) -> Drawn:
        """One picture. `known`: the float one of the same, whose part before the first change is taken over."""
        table = applied(sampler_table(self.student, steps), self.schedule.get(steps, ()))
        changes = {name: one for name, one in (changes or {}).items() if one}
        context = (
            known.context if known and self.encoder not in changes else self.encode(ids, changes.get(self.encoder))
        )
        if known is not None and not {self.encoder, "denoiser"} & set(changes):
            latents, ready = known.latents, known.decoder_input
        else:
            x, held = initial_noise(self.student, [seed]), []
            for index, step in enumerate(table, start=1):
                held.append(x)
                (prediction,) = self.networks["denoiser"](
                    self.denoiser_inputs(step, x, context), changes.get("denoiser")
                )
                x = step.sample * x + step.prediction * prediction
                if step.noise:
                    x = x + step.noise * initial_noise(self.student, [seed], stream=index)
            latents, ready = tuple(held), decoder_input(self.student, x)
        image = self._only("decoder", ready, changes.get("decoder"))
        return Drawn(ids, context, table, latents, ready, image)

    @torch.no_grad()
    def encode(self, ids: Tensor, changed: Mapping[str, Changed] | None = None) -> Tensor:
        return self._only(self.encoder, ids, changed)

    def _only(self, name: str, value: Tensor, changed: Mapping[str, Changed] | None) -> Tensor:
        network = self.networks[name]
        return pack(network({network.inputs[0]: value}, changed))

    @torch.no_grad()
    def answers(self, drawn: Drawn, ids: Tensor, changes: Changes | None = None) -> tuple[Tensor, ...]:
        """The denoiser's word, at each latent of `drawn`, on another prompt."""
        context = self.encode(ids, (changes or {}).get(self.encoder))
        return tuple(
            self.networks["denoiser"](self.denoiser_inputs(step, x, context), (changes or {}).get("denoiser"))[0]
            for step, x in zip(drawn.table, drawn.latents, strict=True)
        )


def mean_square(values: Sequence[Tensor]) -> float:
    """Over the elements of all."""
    return sum(float(one.double().square().sum()) for one in values) / max(1, sum(one.numel() for one in values))
