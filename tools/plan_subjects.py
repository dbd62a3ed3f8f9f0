"""What plans are held against: the `shapes` student with planted outlier channels, and naive whole-int8."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from edgegen.cache import Cache
from edgegen.precision.calibrate import calibrate_once
from edgegen.precision.memo import planner_fingerprint
from edgegen.precision.plan import OpPlan
from edgegen.precision.prompts import default_settings, prompts_for
from edgegen.precision.simulate import Changed, Network
from edgegen.students.networks.tiny_decoder import TinyDecoder
from edgegen.students.networks.unet import Attention, FeedForward
from edgegen.students.student import Component, Student

FACTOR = 100.0
CHANNEL = 5


def planted(student: Student, factor: float = FACTOR, channel: int = CHANNEL) -> Student:
    """`student` with that channel `factor` times as large wherever the next layer can take it back: values of
    attentions, the product in feed-forwards of the denoiser, and convolutions before a relu in the decoder. Other
    weights, the same function."""
    parts = {}
    for name, part in student.components.items():
        module = copy.deepcopy(part.module)
        with torch.no_grad():
            for one in module.modules():
                if isinstance(one, Attention):
                    _scale(one.to_v, one.to_out[0], factor, channel)
                elif isinstance(one, FeedForward):
                    _scale(one.net[0].proj, one.net[2], factor, channel)  # type: ignore[arg-type]
            if isinstance(module, TinyDecoder):
                for path, writer in module.named_modules():
                    if path.endswith(("conv.0", "conv.2")):
                        place = int(path[-1])
                        _scale(writer, module.get_submodule(f"{path[:-1]}{place + 2}"), factor, channel)
        parts[name] = Component(part.name, module, part.inputs, part.outputs)
    return replace(student, components=parts)


def _scale(writer: nn.Module, reader: nn.Module, factor: float, channel: int) -> None:
    weight, bias, other = writer.weight, getattr(writer, "bias", None), reader.weight
    assert isinstance(weight, nn.Parameter) and isinstance(other, nn.Parameter)
    weight[channel] *= factor
    if isinstance(bias, nn.Parameter):
        bias[channel] *= factor
    other[:, channel] /= factor


@dataclass(frozen=True)
class PerTensor(Network):
    """A network whose int8 weights have one scale for all channels."""

    def changed(self, key: str, op: OpPlan) -> Changed:
        weight = self.weight(key)
        if weight is None:
            return Changed(op, None)
        scale = float(weight.abs().amax()) / 127.0
        return Changed(op, torch.fake_quantize_per_tensor_affine(weight, scale, 0, -127, 127))


def naive(
    student: Student, networks: Mapping[str, Network], cache: Cache
) -> tuple[dict[str, Network], dict[str, dict[str, OpPlan]]]:
    """Whole-int8 as it is done without a plan: every convolution and linear in static int8, one scale a tensor, from
    the least and greatest value on the calibration prompts."""
    settings = default_settings().model_copy(update={"observer": "minmax"})
    found = calibrate_once(
        student,
        {name: one.program for name, one in networks.items()},
        {name: "naive" for name in networks},
        prompts_for(student)[: settings.fewest],
        settings,
        cache,
        planner_fingerprint(),
    )
    plans = {
        name: {
            key: OpPlan(op=site.kind, precision="w8a8", input=seen.input, output=seen.output)
            for key, site in one.sites.items()
            if site.weight is not None
            for seen in (found.components[name][key],)
        }
        for name, one in networks.items()
    }
    return {name: PerTensor(name, one.program, one.sites) for name, one in networks.items()}, plans
