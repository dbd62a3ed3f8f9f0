"""Per-channel scales moved from where they hurt: an activation's wide channels become a weight's, exactly.

    norm or conv or linear -> relu or product with another value, or nothing -> conv or linear

What writes channel j is divided by s[j] and what reads it is multiplied by it; in between lie only functions with
f(x / s) = f(x) / s. With s[j] = max|x[j]|^a / max|w[:, j]|^(1 - a) (SmoothQuant, arXiv 2211.10438, with `a` tried over
a grid; cross-layer equalisation, arXiv 1906.04721, is a = 1/2 without norms). A weight's rows have a scale each, so the
writer loses nothing. SiLU and GELU let no scale through: what lies behind them is left. So is what lies behind a norm
whose weight `fold-norm-affine` has moved on: passes would move a new one as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor, module_path
from edgegen.precision.encode import activation_qparams
from edgegen.precision.plan import Range
from edgegen.precision.quantize import tail
from edgegen.precision.repair.tensors import (
    Repaired,
    RepairRecord,
    Samples,
    Tensors,
    apply,
    channel_first,
    channels,
    quality_db,
    seen,
)
from edgegen.precision.sites import LINEAR, TRANSPOSED, sites

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default)
HOMOGENEOUS = (aten.relu.default, aten.leaky_relu.default, aten.dropout.default, aten.clone.default)
POWERS = (0.25, 0.5, 0.65, 0.8, 1.0)
GAIN = 0.8
"""The noise of the readers must fall to this share of what it was, or the pair is left."""
KEPT = 2
"""Samples on which the noise is computed; the extremes are those of all."""
REACH = 8
_GROUPS = 6  # the place of `groups` among a convolution's arguments, a transposed one's too


@dataclass(frozen=True)
class Pair:
    """`value` is what `readers` read along `axis`; `writer` is the call whose channels it has."""

    writer: Node
    value: Node
    readers: tuple[Node, ...]
    axis: int


def equalise(program: ExportedProgram, samples: Samples) -> Repaired:
    """`program` with the same function and flatter channels, judged on `samples` (calls' inputs by name).

    The record's SQNR is that of the rewritten float graph (`after_db`; `before_db` is infinite): it is an identity but
    for rounding, and EdgegenError below 60 dB. What it gains shows when the result is calibrated and quantized.
    """
    pairs, declined = find_pairs(program)
    extremes: dict[str, Tensor] = {}
    kept: list[dict[str, Tensor]] = []
    names = {one.name for pair in pairs for one in (pair.value, pair.writer)}
    for index, sample in enumerate(samples):
        found = seen(program, names, sample)
        for pair in pairs:
            most = channel_first(found[pair.value.name], pair.axis).abs().amax(1)
            known = extremes.get(pair.value.name, most)
            extremes[pair.value.name] = torch.maximum(known, most)
        if index < KEPT:
            kept.append(found)
    tensors: Tensors = {}
    changed = []
    editor = Editor(program, "equalise")  # for its values alone
    for pair in pairs:
        scales = _best(editor, pair, extremes[pair.value.name], kept)
        if scales is None:
            declined[module_path(pair.readers[0])] = "its channels are even enough"
            continue
        tensors.update(_moved(editor, pair, scales, tensors))
        changed += [module_path(one) for one in (pair.writer, *pair.readers)]
    repaired = apply(program, tensors)
    same = quality_db(program, repaired, samples[:KEPT])
    if same < 60.0:
        raise EdgegenError(f"equalisation changed what the graph computes: {same:.1f} dB are left")
    record = RepairRecord(
        name="equalise", changed=tuple(changed), before_db=float("inf"), after_db=same, declined=declined
    )
    return Repaired(repaired, tensors, record)


def find_pairs(program: ExportedProgram) -> tuple[list[Pair], dict[str, str]]:
    """Where a scale can move, and for each other site's module why it cannot."""
    editor = Editor(program, "equalise")
    at = {site.node for site in sites(program).values() if site.weight is not None}
    found: list[Pair] = []
    declined: dict[str, str] = {}
    taken: set[Node] = set()
    for value in editor.nodes():
        readers = [user for user in value.users if user.name in at and user.args[0] is value]
        if not readers:
            continue
        reason = _pair(editor, value, readers, at)
        if isinstance(reason, Pair) and reason.writer not in taken:
            taken.add(reason.writer)
            found.append(reason)
        else:
            said = reason if isinstance(reason, str) else "its scales have moved already"
            declined.update({module_path(one): said for one in readers})
    return found, declined


def _pair(editor: Editor, value: Node, readers: list[Node], at: set[str]) -> Pair | str:
    if len(readers) != len(value.users):
        other = next(user for user in value.users if user not in readers)
        return f"`{other.name}` reads its input too"
    axes = {_axis(one) for one in readers}
    if len(axes) != 1 or None in axes:
        return "its input's channels are not those of its weight"
    (axis,) = axes
    assert axis is not None
    for reader in readers:
        weight = reader.args[1]
        if editor.value(weight) is None or len(weight.users) != 1:  # type: ignore[union-attr]
            return "another call reads its weight"
    writer = _writer(editor, value, at, REACH)
    if isinstance(writer, str):
        return writer
    rank = value.meta["val"].dim()
    if _written(writer) % rank != axis % rank:
        return f"`{writer.name}` writes its channels along another axis"
    return Pair(writer, value, tuple(readers), axis % rank)


def _axis(reader: Node) -> int | None:
    """The axis of the input's channels; None for groups."""
    if reader.target is LINEAR:
        return -1
    rank = int(reader.args[1].meta["val"].dim())  # type: ignore[union-attr]
    if len(reader.args) > _GROUPS and reader.args[_GROUPS] != 1:
        return None
    return 1 - rank


def _written(writer: Node) -> int:
    if writer.target in (LINEAR, aten.layer_norm.default, aten.rms_norm.default):
        return -1
    return 1


def _writer(editor: Editor, value: Node, at: set[str], left: int) -> Node | str:
    """The norm, convolution or linear whose channels `value` has, up to a scale for each."""
    if value.op != "call_function":
        return "its input is the component's"
    if value.target in NORMS:
        axes: Any = value.args[1]
        if value.target is not aten.group_norm.default and len(axes) != 1:
            return "its norm runs over several axes"
        if len(value.args) < 3 or value.args[2] is None:
            # It would be folded into the readers again by the passes of some targets, and their ranges be wrong.
            return "its norm has no weight of its own, and must not get one"
        return value
    if value.name in at:
        weight: Any = value.args[1]
        if value.target in TRANSPOSED and _axis(value) is None:
            return "a grouped transposed convolution lies before it"
        return value if len(weight.users) == 1 else "another call reads the weight before it"
    if not left:
        return "what writes its channels is too far away"
    if value.target in HOMOGENEOUS:
        sources: list[Any] = [value.args[0]]
    elif value.target is aten.mul.Tensor:
        sources = [one for one in value.args if isinstance(one, Node) and _alike(one, value)]
    else:
        return f"`{value.name}` ({value.target}) lies before it, which lets no scale through"
    reason = "nothing that it multiplies is written by a norm, convolution or linear"
    for source in sources:
        if len(source.users) == 1:
            found = _writer(editor, source, at, left - 1)
            if isinstance(found, Node):
                return found
            reason = found
    return reason


def _alike(one: Node, other: Node) -> bool:
    return bool(one.meta["val"].shape == other.meta["val"].shape)


def _best(editor: Editor, pair: Pair, extremes: Tensor, values: list[dict[str, Tensor]]) -> Tensor | None:
    """The scales with which the readers, quantized, are nearest to themselves in float; None when none helps."""
    read = torch.stack([_columns(editor, one).abs().amax(1) for one in pair.readers]).amax(0)
    live = (extremes > 0) & (read > 0)
    if not live.any():
        return None
    ones = torch.ones_like(extremes)
    least = _noise(editor, pair, ones, values)
    limit, best = GAIN * least, None
    for power in POWERS:
        scales = torch.where(live, extremes**power / read ** (1 - power), ones)
        # Powers of two: dividing and multiplying by them rounds nothing.
        scales = torch.exp2(torch.log2(scales / scales[live].log().mean().exp()).round()).clamp(2.0**-12, 2.0**12)
        scales = torch.where(live, scales, ones)
        noise = _noise(editor, pair, scales, values)
        if noise < limit:
            limit, best = noise, scales
    return best


def _columns(editor: Editor, reader: Node) -> Tensor:
    """[C, rest] of a reader's weight."""
    weight = editor.value(reader.args[1])
    assert weight is not None
    return channel_first(weight.detach(), 0 if reader.target in TRANSPOSED else 1)


def _noise(editor: Editor, pair: Pair, scales: Tensor, values: list[dict[str, Tensor]]) -> float:
    """Noise over signal of the readers, summed, with int8 inputs and weights, and an int8 output of the writer where
    that is quantized for itself: what lies between multiplies its errors."""
    exact = [one[pair.value.name] for one in values]
    scaled = [one / channels(scales, one, pair.axis) for one in exact]
    if pair.writer.target not in NORMS and tail(pair.writer) is not pair.value:
        written = [one[pair.writer.name] for one in values]
        coded = _through_int8([one / channels(scales, one, pair.axis) for one in written])
        between = [torch.where(v == 0, v, x / v) for x, v in zip(exact, written, strict=True)]
        scaled = [x * factor for x, factor in zip(coded, between, strict=True)]
    given = _through_int8(scaled)
    total = 0.0
    for reader in pair.readers:
        weight = editor.value(reader.args[1])
        assert weight is not None
        into, out = (0, 1) if reader.target in TRANSPOSED else (1, 0)
        on_grid = _on_grid(weight.detach() * channels(scales, weight, into), out)
        rest: Any = (None, *reader.args[3:])
        assert callable(reader.target)
        noise = signal = 0.0
        for x, value in zip(given, exact, strict=True):
            wanted = reader.target(value, weight.detach(), *rest)
            noise += float((reader.target(x, on_grid, *rest) - wanted).double().square().sum())
            signal += float(wanted.double().square().sum())
        total += noise / max(signal, 1e-30)
    return total


def _through_int8(values: list[Tensor]) -> list[Tensor]:
    """Codes of the range of all of them, and back."""
    low, high = min(float(one.min()) for one in values), max(float(one.max()) for one in values)
    scale, zero = activation_qparams(Range(low=low, high=high))
    return [torch.fake_quantize_per_tensor_affine(one, scale, zero, -128, 127) for one in values]


def _on_grid(weight: Tensor, axis: int) -> Tensor:
    step = channels(channel_first(weight, axis).abs().amax(1).clamp(min=1e-20) / 127, weight, axis)
    return (weight / step).round() * step


def _moved(editor: Editor, pair: Pair, scales: Tensor, made: Mapping[str, Tensor]) -> Tensors:
    """The writer's tensors over `scales`, the readers' times `scales`; on top of what earlier pairs made."""

    def held(node: Node, place: int) -> Tensor | None:
        known = made.get(f"{node.name}:{place}")
        if known is not None:
            return known
        value = editor.value(node.args[place]) if len(node.args) > place else None
        return None if value is None else value.detach()

    moved: Tensors = {}
    writer = pair.writer
    if writer.target in NORMS:
        weight = held(writer, 2)
        moved[f"{writer.name}:2"] = (1 / scales) if weight is None else weight / scales
        bias = None if writer.target is aten.rms_norm.default else held(writer, 3)
        if bias is not None:
            moved[f"{writer.name}:3"] = bias / scales
    else:
        weight, bias = held(writer, 1), held(writer, 2)
        assert weight is not None
        moved[f"{writer.name}:1"] = weight / channels(scales, weight, 1 if writer.target in TRANSPOSED else 0)
        if bias is not None:
            moved[f"{writer.name}:2"] = bias / scales
    for reader in pair.readers:
        weight = held(reader, 1)
        assert weight is not None
        moved[f"{reader.name}:1"] = weight * channels(scales, weight, 0 if reader.target in TRANSPOSED else 1)
    return moved
