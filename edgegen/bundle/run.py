"""The host runtime: draws a picture with a bundle, from its manifest alone.

Nothing here knows the student or its scheduler: components, shapes, sampler coefficients, latent scale and the noise
stream are read from the manifest, as an app reads them. torch is imported only where a backend's own runtime needs it.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgegen.bundle.noise import SEED_LIMIT, normal
from edgegen.bundle.open import Bundle
from edgegen.errors import EdgegenError, GateError, UsageError
from edgegen.lower.backend import BACKENDS, Array, Executable, get_backend
from edgegen.lower.requirements import missing_modules
from edgegen.lower.stand_in import executed_by
from edgegen.students.sampler import SamplerStep, moment
from edgegen.verify.trajectory import Picture, to_picture

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Generated:
    """One picture and how it came about.

    `image` is uint8 [H, W, 3]; `decoded` the decoder's output [1, 3, H, W] fp32; `noise` and `latents` (after each
    step) are [1, C, h, w] fp32. `timings` are seconds by stage, in order. `warnings` say what of the prompt was not
    used as it is.
    """

    image: Picture
    decoded: Floats
    noise: Floats
    latents: tuple[Floats, ...]
    input_ids: NDArray[np.int32]
    backend: str
    seed: int
    steps: int
    timings: dict[str, float]
    warnings: tuple[str, ...]
    executed_by: str | None = None
    """Who executed the artifacts in place of the runtime that they are for: the timings are no latency then."""


def generate(bundle: Bundle, prompt: str, seed: int, steps: int | None = None, backend: str | None = None) -> Generated:
    """Load the artifacts of one backend, draw `prompt` from `seed`, close them; see `Runtime` for the errors."""
    with Runtime(bundle, backend) as runtime:
        return runtime.generate(prompt, seed, steps)


def choose_backend(bundle: Bundle, wanted: str | None = None) -> str:
    """The first backend of the target's order whose runtime is here, or `wanted` and no other.

    Where no runtime is, the first that something else executes here (see `edgegen.lower.stand_in`). UsageError when
    there is none, with the reason for each.
    """
    have = bundle.backends()
    if wanted is not None:
        if wanted not in have:
            if wanted not in BACKENDS:
                get_backend(wanted)  # raises with the list of those that exist
            hint = " or ".join(f"`--backend {name}`" for name in have) or "build it with the backend that you need"
            why = bundle.manifest.declined.get(wanted)
            raise UsageError(
                f"bundle `{bundle.root}` has no complete set of artifacts for `{wanted}`" + (f": {why}" if why else ""),
                hint=f"use {hint}" if have else hint,
            )
        have = (wanted,)
    reasons: list[str] = []
    stand_in: str | None = None
    install: str | None = None
    for name in have:
        if name not in BACKENDS:
            reasons.append(f"`{name}` is not known to this edgegen")
            continue
        candidate = get_backend(name)
        reason = candidate.not_executed_here()
        missing = missing_modules(candidate, "run")
        if reason is None and not missing:
            if executed_by(candidate) is None:
                return name
            stand_in = stand_in or name
            continue
        if reason is None:
            reason = "not installed: " + ", ".join(f"`{module}`" for module in missing)
            install = install or f"pip install 'edgegen[{candidate.extra}]'"
        reasons.append(f"`{name}`: {reason}")
    if stand_in is not None:
        return stand_in
    said = "; ".join(reasons) or "no backend has all of its components"
    raise UsageError(
        f"bundle `{bundle.root}` cannot be executed here: {said}",
        hint=install or "build for this machine too: `edgegen build --target linux-x86 MODEL`",
    )


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
        with _timed(self.timings, "load.tokenizer"):
            self._tokenizer, self._unknown = _tokenizer(bundle)
        artifacts = bundle.artifacts(self.backend)
        try:
            for name, io in self._components.items():
                with _timed(self.timings, f"load.{name}"):
                    path = bundle.loadable(artifacts[name])
                    self._executables[name] = chosen.load(path, io.inputs, io.outputs)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the artifacts."""
        while self._executables:
            self._executables.popitem()[1].close()

    def tokenize(self, prompt: str) -> tuple[NDArray[np.int32], tuple[str, ...]]:
        """`prompt` -> input_ids [1, L] int32, and what was not read as it is: unknown words, a cut end."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UsageError("the prompt is no valid text (UTF-8)", hint="type the prompt in UTF-8") from error
        encoding = self._tokenizer.encode(prompt)
        shape = self._components["text_encoder"].inputs[0].shape
        if len(encoding.ids) != shape[-1]:
            raise EdgegenError(
                f"the bundle's tokenizer gives {len(encoding.ids)} ids, its text encoder takes {shape[-1]}"
            )
        warnings = []
        if self._unknown is not None:
            read = zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
            unknown = [
                prompt[start:end] for token, (start, end), special in read if token == self._unknown and not special
            ]
            if words := ", ".join(f"`{word}`" for word in dict.fromkeys(unknown) if word):
                warnings.append(f"the student does not know {words}; it reads an unknown word there")
        cut = [offset for part in encoding.overflowing for offset in _kept_offsets(part)]
        if cut:
            rest = prompt[min(start for start, _ in cut) :]
            warnings.append(f"the prompt is longer than the student reads; `{rest}` is cut off")
        return np.array([encoding.ids], dtype=np.int32).reshape(shape), tuple(warnings)

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

    def generate(self, prompt: str, seed: int, steps: int | None = None) -> Generated:
        """Draw `prompt` from `seed`. UsageError for steps or a seed that cannot be; GateError when a component's output
        is not finite, naming it."""
        table = self.table(steps)
        if not 0 <= seed < SEED_LIMIT:
            raise UsageError(f"seed {seed} does not fit 64 bits", hint=f"choose a seed from 0 to {SEED_LIMIT - 1}")
        latent = self.bundle.manifest.latent
        assert latent is not None
        timings = dict(self.timings)
        with _timed(timings, "tokenize"):
            input_ids, warnings = self.tokenize(prompt)
        with _timed(timings, "text_encoder"):
            given: dict[str, Array] = {self._components["text_encoder"].inputs[0].name: input_ids}
            context = self._call("text_encoder", given)
        with _timed(timings, "noise"):
            noise = normal(seed, 0, latent.shape)
        names = {spec.name for spec in self._components["denoiser"].inputs}
        x, latents = noise, []
        for index, step in enumerate(table, start=1):
            with _timed(timings, f"denoiser.{index}"):
                given = {**context, **moment(step, names), "latent": np.float32(step.input_scale) * x}
                prediction = self._one("denoiser", given, f" at step {index} of {len(table)}")
                x = np.float32(step.sample) * x + np.float32(step.prediction) * prediction
                if step.noise:
                    x = x + np.float32(step.noise) * normal(seed, index, latent.shape)
                latents.append(x)
                if not np.isfinite(x).all():
                    raise GateError(
                        f"the latent is not finite after step {index} of {len(table)} with backend `{self.backend}`",
                        hint=f"edgegen verify {shlex.quote(str(self.bundle.root))}",
                    )
        with _timed(timings, "decoder"):
            name = self._components["decoder"].inputs[0].name
            decoded = self._one("decoder", {name: np.float32(latent.scale) * x + np.float32(latent.shift)})
        with _timed(timings, "picture"):
            image = to_picture(decoded)
        return Generated(
            image=image,
            decoded=decoded,
            noise=noise,
            latents=tuple(latents),
            input_ids=input_ids,
            backend=self.backend,
            seed=seed,
            steps=len(table),
            timings=timings,
            warnings=warnings,
            executed_by=self.executed_by,
        )

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
    """The manifest describes a text-to-image student whose parts fit together."""
    manifest = bundle.manifest
    if manifest.task != "text-to-image":
        raise UsageError(
            f"bundle `{bundle.root}` is a single network and draws no picture",
            hint=f"edgegen inspect {shlex.quote(str(bundle.root))}",
        )
    absent = [name for name in ("text_encoder", "denoiser", "decoder") if name not in manifest.components]
    absent += [name for name in ("sampler", "latent", "noise", "tokenizer") if getattr(manifest, name) is None]
    if absent:
        raise EdgegenError(f"bundle `{bundle.root}` lacks its {', '.join(absent)}", hint="build the bundle again")
    text, denoiser, decoder = (manifest.components[name] for name in ("text_encoder", "denoiser", "decoder"))
    assert manifest.latent is not None
    latent = manifest.latent.shape
    given = {"latent": latent, **{spec.name: spec.shape for spec in text.outputs}}
    moments = {"timestep": (1,), "step": (1,)}
    wanted = {spec.name: spec.shape for spec in denoiser.inputs if moments.get(spec.name) != spec.shape}
    square = len(decoder.outputs) == 1 and len(decoder.outputs[0].shape) == 4 and decoder.outputs[0].shape[:2] == (1, 3)
    ends = len(text.inputs) == len(decoder.inputs) == len(denoiser.outputs) == 1
    if not (ends and square and given == wanted and decoder.inputs[0].shape == denoiser.outputs[0].shape == latent):
        raise EdgegenError(f"components of bundle `{bundle.root}` do not fit together", hint="build the bundle again")


def _tokenizer(bundle: Bundle) -> tuple[Tokenizer, int | None]:
    """The tokenizer and the id that it gives to unknown words, None where it has no word for them."""
    from tokenizers import Tokenizer

    assert bundle.manifest.tokenizer is not None
    path: Path = bundle.path(bundle.manifest.tokenizer)
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        unknown = json.loads(text)["model"].get("unk_token")
    except Exception as error:  # the library raises bare Exception for a file it cannot use
        raise EdgegenError(f"tokenizer `{path}` cannot be used: {error}", hint="build the bundle again") from error
    return tokenizer, tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None


def _kept_offsets(encoding: Any) -> list[tuple[int, int]]:
    """Where the real tokens of an encoding lie in the prompt."""
    read = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return [offset for offset, special in read if not special]


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started
