"""Ranges, observed on the student's own trajectory: its prompts, its few steps, its own latents into the decoder.

The canonical graphs draw the pictures themselves, and every value that an op of a plan takes or gives is counted on its
way, at each of the sampler's timesteps apart. One picture at a time; nothing of it is kept but histograms.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.cache import Cache
from edgegen.errors import EdgegenError
from edgegen.graph.capture import signature
from edgegen.graph.count import count
from edgegen.graph.edit import module_path
from edgegen.graph.evaluate import evaluate
from edgegen.precision.conditioning import asked, pack
from edgegen.precision.histogram import Histogram
from edgegen.precision.plan import Calibration, Range
from edgegen.precision.prompts import Settings, check_prompts
from edgegen.precision.quantize import tail
from edgegen.precision.sites import Site, sites
from edgegen.students.sample import decoder_input, initial_noise, sampler_table
from edgegen.students.sampler import moment
from edgegen.students.student import Student

aten = torch.ops.aten
_MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
)
"""What gives the values that it takes: what was seen before it is what would be seen after."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Observed(_Model):
    """What one op takes and gives; `step_inputs` as `OpPlan` has it."""

    input: Range
    output: Range
    other: Range | None = None
    step_inputs: tuple[Range, ...] = ()


class Ranges(_Model):
    """Component -> op -> what was observed, and on what."""

    components: dict[str, dict[str, Observed]]
    calibration: Calibration


def calibrate(
    student: Student,
    programs: Mapping[str, ExportedProgram],
    prompts: Sequence[str],
    settings: Settings,
    steps: Sequence[int] | None = None,
    done: Callable[[int, int], None] = lambda drawn, of: None,
) -> Ranges:
    """Draw each prompt at each number of `steps` (all that the student serves) through the canonical `programs`.

    Prompt i is drawn from seed `settings.seed` + i. `done` is called after every picture. A `single` student is called
    on its example inputs. UsageError for too few or broken prompts, and for a number of steps that the student was not
    distilled for; EdgegenError names the op and the prompt where NaN or infinity comes out.
    """
    watching = {name: _Watch.of(name, program, settings) for name, program in programs.items()}
    if student.config.sampler is None:
        for name, watch in watching.items():
            for given in student.components[name].samples():
                named = {spec.name: one for spec, one in zip(student.components[name].inputs, given, strict=True)}
                watch(named, "its example inputs")
        done(1, 1)
        counts: tuple[int, ...] = ()
    else:
        counts = tuple(steps or sorted(student.config.sampler.times))
        for number in counts:
            sampler_table(student, number)
        prompts = check_prompts(student, prompts, settings.fewest)
        for index, prompt in enumerate(prompts):
            for place, number in enumerate(counts):
                _draw(student, watching, prompt, settings.seed + index, number)
                done(index * len(counts) + place + 1, len(prompts) * len(counts))
    found = {name: watch.found() for name, watch in watching.items()}
    drawn = tuple(prompts) if counts else ()
    calibration = Calibration(
        prompts=len(drawn), seed=settings.seed, steps=counts, sha256=fingerprint(drawn, settings, counts)
    )
    return Ranges(components=found, calibration=calibration)


def fingerprint(prompts: Sequence[str], settings: Settings, steps: Sequence[int]) -> str:
    """sha256 over prompts, seed, settings and steps."""
    said = [list(prompts), settings.model_dump(), list(steps)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def calibrate_once(
    student: Student,
    programs: Mapping[str, ExportedProgram],
    passes: Mapping[str, str],
    prompts: Sequence[str],
    settings: Settings,
    cache: Cache,
    compiler: str,
    steps: Sequence[int] | None = None,
    done: Callable[[int, int], None] = lambda drawn, of: None,
) -> Ranges:
    """As `calibrate`, but what was observed before is read from `cache`.

    `passes`: component -> the pipeline that made its program; `compiler`: what identifies the code that does all this.
    """
    key = cache.key(
        "calibrate",
        student=student.fingerprint,
        passes=dict(sorted(passes.items())),
        prompts=list(prompts),
        settings=settings.model_dump(),
        steps=list(steps) if steps else None,
        torch=torch.__version__,
        compiler=compiler,
    )

    def build(entry: Path) -> None:
        found = calibrate(student, programs, prompts, settings, steps, done)
        (entry / "ranges.json").write_text(found.model_dump_json())

    return Ranges.model_validate_json((cache.directory(key, build) / "ranges.json").read_text())


def affordable(programs: Mapping[str, ExportedProgram], counts: Sequence[int], settings: Settings) -> int:
    """How many prompts `settings.macs` is enough for, between `settings.fewest` and `settings.prompts`."""
    each = {name: count(program).macs for name, program in programs.items()}
    denoiser = each.pop("denoiser", 0)
    one = sum(number * denoiser + sum(each.values()) for number in counts)
    return max(settings.fewest, min(settings.prompts, settings.macs // max(1, one)))


def _draw(student: Student, watching: Mapping[str, _Watch], prompt: str, seed: int, steps: int) -> None:
    """One picture, as `edgegen.students.sample.denoise` draws it, through the watched graphs."""
    encoder, denoiser, decoder = (watching[name] for name in (student.conditioning.name, "denoiser", "decoder"))
    where = f"prompt “{prompt}”"
    context = encoder({encoder.inputs[0]: student.given([prompt])}, where)
    x = initial_noise(student, [seed])
    for index, step in enumerate(sampler_table(student, steps), start=1):
        given = {"latent": step.input_scale * x, **asked(student, context, denoiser.inputs)}
        given |= {name: torch.from_numpy(value) for name, value in moment(step, denoiser.inputs).items()}
        prediction = denoiser(given, f"{where}, step {index} of {steps}", step.index)
        x = step.sample * x + step.prediction * prediction
        if step.noise:
            x = x + step.noise * initial_noise(student, [seed], stream=index)
    decoder({decoder.inputs[0]: decoder_input(student, x)}, where)


@dataclass
class _Watch:
    """One component's graph and a histogram, at each timestep, of every tensor that its sites take or give."""

    name: str
    program: ExportedProgram
    settings: Settings
    known: dict[str, Site]
    ends: dict[str, tuple[str, ...]]
    """Site -> the values that it takes, one or two, and the one that it gives."""
    inputs: tuple[str, ...]
    seen: dict[str, dict[int, Histogram]] = field(default_factory=dict)

    @staticmethod
    def of(name: str, program: ExportedProgram, settings: Settings) -> _Watch:
        known = sites(program)
        nodes = {node.name: node for node in program.graph.nodes}
        ends = {}
        for key, site in known.items():
            node: Any = nodes[site.node]
            taken = node.args[:1] if site.weight is not None else node.args[:2]
            ends[key] = (*(_source(one).name for one in taken), tail(node).name)
        return _Watch(name, program, settings, known, ends, tuple(spec.name for spec in signature(program)))

    def __call__(self, inputs: Mapping[str, Tensor], where: str, step: int = 0) -> Tensor:
        """The output on `inputs` (several: packed), every value of interest counted under `step`."""
        wanted = {one for names in self.ends.values() for one in names}

        def see(name: str, module: str, value: Tensor) -> None:
            histogram = self.seen.setdefault(name, {}).setdefault(step, Histogram())
            if not histogram.see(value):
                raise EdgegenError(
                    f"calibration: `{module or name}` of `{self.name}` gives NaN or infinity on {where}",
                    hint="check the checkpoint, and what that prompt does to the float student",
                )

        def watch(node: Node, value: Any) -> None:
            if node.name in wanted:
                see(node.name, module_path(node), value)

        for name, value in inputs.items():
            if name in wanted:
                see(name, "", value)
        output = pack(evaluate(self.program, inputs, watch))
        if not torch.isfinite(output).all():
            raise EdgegenError(f"calibration: `{self.name}` gives NaN or infinity on {where}", hint="check the student")
        return output

    def found(self) -> dict[str, Observed]:
        whole = {name: self._whole(name) for name in {one for names in self.ends.values() for one in names}}
        observed = {}
        for key, (*taken, given) in self.ends.items():
            observed[key] = Observed(
                input=whole[taken[0]],
                other=whole[taken[1]] if len(taken) > 1 else None,
                output=whole[given],
                step_inputs=self._by_step(taken[0]),
            )
        return observed

    def _whole(self, name: str) -> Range:
        merged = Histogram()
        for histogram in self.seen[name].values():
            merged.add(histogram)
        return merged.range(self.settings.observer)

    def _by_step(self, name: str) -> tuple[Range, ...]:
        """The range at each timestep, where the widest is more than `settings.disagreement` times the narrowest."""
        each = [histogram.range(self.settings.observer) for _, histogram in sorted(self.seen[name].items())]
        widths = [one.high - one.low for one in each]
        return tuple(each) if max(widths) > self.settings.disagreement * min(widths) else ()


def _source(node: Node) -> Node:
    """Where the values of `node` were computed, before they were only moved."""
    for source in _chain(node):
        node = source
    return node


def _chain(node: Any) -> Iterator[Node]:
    while node.target in _MOVES and isinstance(node.args[0], Node) and _size(node.args[0]) == _size(node):
        node = node.args[0]
        yield node


def _size(node: Node) -> int:
    return int(node.meta["val"].numel())
