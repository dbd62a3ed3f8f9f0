"""The host runtime: draws a picture or a video with a bundle, from its manifest alone.

Nothing here knows the student or its scheduler: components, shapes, sampler coefficients, latent scale and the noise
stream are read from the manifest, as an app reads them. torch is imported only where a backend's own runtime needs it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgegen.bundle.backends import choose_backend
from edgegen.bundle.noise import SEED_LIMIT, normal
from edgegen.bundle.open import Bundle
from edgegen.bundle.prompt import PromptReader
from edgegen.errors import EdgegenError, GateError, UsageError
from edgegen.lower.backend import Array, Executable, get_backend
from edgegen.lower.chain import load_artifact
from edgegen.lower.stand_in import executed_by
from edgegen.students.conditions import chosen_conditions
from edgegen.students.config import TASKS
from edgegen.students.sampler import SamplerStep, moment
from edgegen.verify.trajectory import Frames, Picture, scalars, strip, to_frames

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Generated:
    """One picture or video and how it came about.

    `frames` is uint8 [T, H, W, 3], T = 1 for a picture; `decoded` the decoder's output, [1, 3, H, W] or [1, 3, T, H, W]
    fp32; `noise` and `latents` (after each step) are shaped as the latent. `given` is what the conditioning component
    took: input_ids [1, L] or the picture [1, 3, h, w]. `timings` are seconds by stage, in order. `warnings` say what
    of the prompt was not used as it is.
    """

    frames: Frames
    decoded: Floats
    noise: Floats
    latents: tuple[Floats, ...]
    given: Array
    conditions: dict[str, float]
    backend: str
    seed: int
    steps: int
    timings: dict[str, float]
    warnings: tuple[str, ...]
    executed_by: str | None = None
    """Who executed the artifacts in place of the runtime that they are for: the timings are no latency then."""

    @property
    def image(self) -> Picture:
        """The picture, [H, W, 3]; of a video a strip of its frames."""
        return strip(self.frames)


class Progress(Protocol):
    """Where a drawing says what it is doing; `edgegen.cli.console` has the one that people see."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self) -> None: ...


class _Silent:
    def stage(self, name: str, total: int) -> None: ...

    def advance(self) -> None: ...


def generate(
    bundle: Bundle, asked: str | Floats, seed: int, steps: int | None = None, backend: str | None = None
) -> Generated:
    """Load the artifacts of one backend, draw what was `asked` from `seed`, close them; see `Runtime.generate`."""
    with Runtime(bundle, backend) as runtime:
        return runtime.generate(asked, seed, steps)


class Runtime:
    """The artifacts of one backend, loaded; draws any number of pictures. A context manager.

    UsageError for a bundle that draws no pictures or that this host cannot execute; EdgegenError for one that does not
    fit together or whose artifacts do not load.
    """

    def __init__(self, bundle: Bundle, backend: str | None = None) -> None:
        self.bundle = bundle
        self.timings: dict[str, float] = {}
        _check_draws(bundle)
        self.backend = choose_backend(bundle, backend)
        chosen = get_backend(self.backend)
        self.executed_by = executed_by(chosen)
        self._components = bundle.manifest.components
        self._executables: dict[str, Executable] = {}
        self._encoder = TASKS[bundle.manifest.task][0]
        self._prompts: PromptReader | None = None
        if self._encoder == "text_encoder":
            with _timed(self.timings, "load.tokenizer"):
                self._prompts = PromptReader(bundle, self._components[self._encoder].inputs[0].shape)
        memory = bundle.manifest.memory.get(self.backend)
        self._in_turn = memory is not None and memory.load == "sequential"
        if not self._in_turn:
            try:
                for name in self._components:
                    self._load(name, self.timings)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, name: str, timings: dict[str, float]) -> None:
        with _timed(timings, f"load.{name}"):
            io = self._components[name]
            self._executables[name] = load_artifact(
                get_backend(self.backend),
                self.bundle.loadable(self.bundle.artifacts(self.backend)[name]),
                io.inputs,
                io.outputs,
                resident=not self._in_turn,
                tiling=self.bundle.manifest.tilings.get(name),
            )

    @contextmanager
    def _turn(self, name: str, timings: dict[str, float]) -> Iterator[None]:
        """The component is loaded within this; where memory is short, no other is."""
        if not self._in_turn:
            yield
            return
        self._load(name, timings)
        try:
            yield
        finally:
            self._executables.pop(name).close()

    def close(self) -> None:
        """Let go of the artifacts."""
        while self._executables:
            self._executables.popitem()[1].close()

    def table(self, steps: int | None = None) -> tuple[SamplerStep, ...]:
        """The sampler's coefficients for `steps` (default: the bundle's); UsageError names the counts it has."""
        sampler = self.bundle.manifest.sampler
        assert sampler is not None
        wanted = sampler.default_steps if steps is None else steps
        if wanted not in sampler.tables:
            known = " or ".join(f"`--steps {count}`" for count in sorted(sampler.tables))
            raise UsageError(
                f"student `{self.bundle.manifest.name}` was not distilled for {wanted} steps", hint=f"use {known}"
            )
        return sampler.tables[wanted]

    def start_size(self) -> tuple[int, int]:
        """Height and width of the picture that the student starts from; UsageError for one that starts from text."""
        if self._prompts is not None:
            raise self._wants_text()
        height, width = self._components[self._encoder].inputs[0].shape[-2:]
        return height, width

    def _wants_text(self) -> UsageError:
        return UsageError(
            f"student `{self.bundle.manifest.name}` starts from text, not from a picture",
            hint="use `--prompt TEXT` in place of `--image`",
        )

    def read(self, asked: str | Floats) -> tuple[Array, tuple[str, ...]]:
        """What was asked as the conditioning component takes it, and remarks. UsageError for text where the student
        starts from a picture, the other way round, and a picture of another size."""
        spec = self._components[self._encoder].inputs[0]
        if isinstance(asked, str):
            if self._prompts is None:
                raise UsageError(
                    f"student `{self.bundle.manifest.name}` starts from a picture, not from text",
                    hint="use `--image FILE` in place of `--prompt`",
                )
            return self._prompts.read(asked)
        if self._prompts is not None:
            raise self._wants_text()
        if asked.shape != spec.shape or not np.isfinite(asked).all():
            raise UsageError(f"the picture is {list(asked.shape)} and must be finite numbers {list(spec.shape)}")
        return np.asarray(asked, dtype=np.float32), ()

    def generate(
        self,
        asked: str | Floats,
        seed: int,
        steps: int | None = None,
        conditions: Mapping[str, float] | None = None,
        progress: Progress | None = None,
    ) -> Generated:
        """Draw what was `asked`, a prompt or a picture [1, 3, H, W] in -1..1, from `seed`.

        `conditions` replaces scalars that the manifest names. UsageError for steps, a seed or a condition that cannot
        be, and as `read` has it; GateError when a component's output is not finite, naming it.
        """
        table, shown = self.table(steps), progress or _Silent()
        manifest = self.bundle.manifest
        chosen = chosen_conditions(manifest.conditions, conditions, manifest.name)
        if not 0 <= seed < SEED_LIMIT:
            raise UsageError(f"seed {seed} does not fit 64 bits", hint=f"choose a seed from 0 to {SEED_LIMIT - 1}")
        latent = manifest.latent
        assert latent is not None
        timings = dict(self.timings)
        shown.stage(f"read, {self._encoder.replace('_', ' ')}", 1)
        with _timed(timings, "tokenize" if self._prompts is not None else "start"):
            start, warnings = self.read(asked)
        with self._turn(self._encoder, timings), _timed(timings, self._encoder):
            heard = self._call(self._encoder, {self._components[self._encoder].inputs[0].name: start})
        shown.advance()
        with _timed(timings, "noise"):
            noise = normal(seed, 0, latent.shape)
        names = {spec.name for spec in self._components["denoiser"].inputs}
        kept = {name: value for name, value in {**heard, **scalars(chosen)}.items() if name in names}
        shown.stage("denoise, step by step", len(table))
        with self._turn("denoiser", timings):
            latents = self._denoise(noise, kept, table, seed, timings, shown)
        shown.stage("decode", 1)
        with self._turn("decoder", timings), _timed(timings, "decoder"):
            name = self._components["decoder"].inputs[0].name
            decoded = self._one("decoder", {name: np.float32(latent.scale) * latents[-1] + np.float32(latent.shift)})
        with _timed(timings, "picture"):
            frames = to_frames(decoded)
        shown.advance()
        return Generated(
            frames=frames,
            decoded=decoded,
            noise=noise,
            latents=latents,
            given=start,
            conditions=chosen,
            backend=self.backend,
            seed=seed,
            steps=len(table),
            timings=timings,
            warnings=warnings,
            executed_by=self.executed_by,
        )

    def _denoise(
        self,
        noise: Floats,
        kept: Mapping[str, Array],
        table: Sequence[SamplerStep],
        seed: int,
        timings: dict[str, float],
        shown: Progress,
    ) -> tuple[Floats, ...]:
        """The latent after each step of `table`; `kept` is what the denoiser is given at every step."""
        names = {spec.name for spec in self._components["denoiser"].inputs}
        x, latents = noise, []
        for index, step in enumerate(table, start=1):
            when = f"step {index} of {len(table)}"
            with _timed(timings, f"denoiser.{index}"):
                given = {**kept, **moment(step, names), "latent": np.float32(step.input_scale) * x}
                prediction = self._one("denoiser", given, f" at {when}")
                x = np.float32(step.sample) * x + np.float32(step.prediction) * prediction
                if step.noise:
                    x = x + np.float32(step.noise) * normal(seed, index, noise.shape)
                latents.append(x)
                if not np.isfinite(x).all():
                    raise GateError(
                        f"the latent is not finite after {when} with backend `{self.backend}`",
                        hint=f"edgegen verify {shlex.quote(str(self.bundle.root))}",
                    )
            shown.advance()
        return tuple(latents)

    def _one(self, component: str, inputs: Mapping[str, Array], when: str = "") -> Floats:
        out = self._call(component, inputs, when)[self._components[component].outputs[0].name]
        return np.asarray(out, dtype=np.float32)

    def _call(self, component: str, inputs: Mapping[str, Array], when: str = "") -> dict[str, Array]:
        out = self._executables[component](inputs)
        for spec in self._components[component].outputs:
            value = out[spec.name]
            if value.shape != spec.shape:
                raise EdgegenError(f"component `{component}` gave `{spec.name}` as {value.shape}, not {spec.shape}")
            if not np.isfinite(value).all():
                raise GateError(
                    f"component `{component}` of backend `{self.backend}` gave values that are not finite{when}",
                    hint=f"edgegen verify {shlex.quote(str(self.bundle.root))}",
                )
        return out


def _check_draws(bundle: Bundle) -> None:
    """The manifest describes a student that draws, and its parts fit together."""
    manifest = bundle.manifest
    if manifest.task == "single":
        raise UsageError(
            f"bundle `{bundle.root}` is a single network and draws nothing from a prompt",
            hint=f"edgegen run {shlex.quote(str(bundle.root))} --inputs inputs.npz",
        )
    parts = TASKS[manifest.task]
    absent = [name for name in parts if name not in manifest.components]
    needed = ("sampler", "latent", "noise", *(("tokenizer",) if parts[0] == "text_encoder" else ()))
    absent += [name for name in needed if getattr(manifest, name) is None]
    if absent:
        raise EdgegenError(f"bundle `{bundle.root}` lacks its {', '.join(absent)}", hint="build the bundle again")
    encoder, denoiser, decoder = (manifest.components[name] for name in parts)
    assert manifest.latent is not None
    latent = manifest.latent.shape
    given = {"latent": latent, **{spec.name: spec.shape for spec in encoder.outputs}}
    given |= {name: (1,) for name in ("timestep", "step", *manifest.conditions)}
    wanted = {spec.name: spec.shape for spec in denoiser.inputs}
    known = all(given.get(name) == shape for name, shape in wanted.items()) and "latent" in wanted
    rank = 5 if manifest.task == "image-to-video" else 4
    seen = (
        len(decoder.outputs) == 1 and len(decoder.outputs[0].shape) == rank and decoder.outputs[0].shape[:2] == (1, 3)
    )
    ends = len(encoder.inputs) == len(decoder.inputs) == len(denoiser.outputs) == 1
    # Only what the encoder gives can say what is to be drawn: a denoiser that takes none of it draws anything.
    listens = any(spec.name in wanted for spec in encoder.outputs)
    fits = decoder.inputs[0].shape == denoiser.outputs[0].shape == latent if ends else False
    if not (ends and seen and known and listens and fits):
        raise EdgegenError(f"components of bundle `{bundle.root}` do not fit together", hint="build the bundle again")


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started
