"""Every artifact is run and held against the reference, per component, step and final picture. Imports no torch.

Three questions, each of which the other two can miss:

1. Is each component right on the inputs that the student itself produces? (SQNR, worst case)
2. Does the compiled loop, left to itself, arrive at the same picture? (latent SQNR after each step, picture PSNR)
3. Does the compiled denoiser listen to the prompt as much as the reference does, and in the same direction?
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgegen.bundle.manifest import Gates
from edgegen.graph.tiles import Tiling
from edgegen.lower.backend import Array, Backend, Delegation, Executable, HeldTo
from edgegen.lower.chain import load_artifact
from edgegen.students.sampler import SamplerStep
from edgegen.verify.gates import check, default_gates, meets, required_of_float, required_of_plan
from edgegen.verify.metrics import picture_psnr_db, sensitivity, sqnr_db
from edgegen.verify.outcome import (
    ComponentParity,
    Outcome,
    OutputParity,
    ParityReport,
    PictureParity,
    SensitivityStep,
    Unavailable,
)
from edgegen.verify.timed import Timed
from edgegen.verify.trajectory import Floats, Pair, Picture, Reference, Signature, Trajectory, scalars, to_picture

Made = dict[bytes, dict[str, Array]]
"""What the compiled loop has computed, by what was called on which numbers: the same call is not made again."""


class ArtifactError(Exception):
    """An artifact broke its signature, or raised while running; becomes a typed outcome, never reaches a user."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason


@dataclass(frozen=True)
class CompiledRun:
    """The compiled loop's own trajectory: latent after each step, and what the decoder gives."""

    latents: tuple[Floats, ...]
    image: Floats


def load_executables(
    backend: Backend,
    artifacts: Mapping[str, Path],
    signatures: Mapping[str, Signature],
    tilings: Mapping[str, Tiling] | None = None,
) -> dict[str, Timed | Unavailable]:
    """Load what this host can execute; the rest is `Unavailable` with the reason, which `verify` takes as well.

    `tilings` has the components whose artifact computes one tile.
    """
    reason = backend.not_executed_here()
    if reason is not None:
        return {name: Unavailable(outcome=Outcome.NOT_EXECUTED, reason=reason) for name in artifacts}
    loaded: dict[str, Timed | Unavailable] = {}
    for name, path in artifacts.items():
        try:
            tiling = (tilings or {}).get(name)
            started = time.perf_counter()
            ready = load_artifact(backend, path, signatures[name].inputs, signatures[name].outputs, tiling=tiling)
            loaded[name] = Timed(ready, time.perf_counter() - started)
        except Exception as error:  # a runtime may raise anything on a file it does not like; the reason is reported
            loaded[name] = Unavailable(outcome=Outcome.LOAD_FAIL, reason=_one_line(error))
    return loaded


def call(executable: Executable, signature: Signature, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run one artifact; ArtifactError when it raises (RUN_FAIL) or breaks its signature (MISMATCH)."""
    try:
        out = executable({name: np.array(value) for name, value in inputs.items()})
    except Exception as error:  # as above
        raise ArtifactError(Outcome.RUN_FAIL, _one_line(error)) from error
    for spec in signature.outputs:
        if spec.name not in out:
            found = ", ".join(f"`{name}`" for name in out) or "nothing"
            raise ArtifactError(Outcome.MISMATCH, f"output `{spec.name}` is missing, found {found}")
        value = np.asarray(out[spec.name])
        if value.shape != spec.shape or value.dtype.name != spec.dtype:
            gave, want = f"{value.dtype.name}{list(value.shape)}", f"{spec.dtype}{list(spec.shape)}"
            raise ArtifactError(Outcome.MISMATCH, f"output `{spec.name}` is {gave}, its signature says {want}")
    return out


def compiled_run(
    reference: Reference, trajectory: Trajectory, executables: Mapping[str, Executable], made: Made | None = None
) -> CompiledRun:
    """Draw the trajectory's prompt from its noise with the artifacts alone. ArtifactError when one of them fails.

    Every component is called; `made` is given what conditions the prompt and what the first step gave.
    """
    signatures = reference.signatures
    conditioning = _condition(executables, reference, trajectory.given, made, keep=True)
    x = trajectory.noise
    latents: list[Floats] = []
    with np.errstate(over="ignore", invalid="ignore"):  # an artifact that diverges is measured, not warned about
        for step in trajectory.steps:
            by = step.coefficients
            scaled = np.float32(by.input_scale) * x
            first = made if not latents else None
            prediction = _denoise(executables, signatures["denoiser"], scaled, by, conditioning, first, keep=True)
            x = np.float32(by.sample) * x + np.float32(by.prediction) * prediction
            if step.noise is not None:
                x = x + np.float32(by.noise) * step.noise
            latents.append(x)
        ready = np.float32(reference.latent_scale) * x + np.float32(reference.latent_shift)
    return CompiledRun(tuple(latents), _first(executables, signatures, "decoder", ready))


def verify(
    reference: Reference,
    executables: Mapping[str, Executable | Unavailable],
    precision: HeldTo,
    gates: Gates | None = None,
    *,
    backend: str,
    executed_by: str | None = None,
    delegations: Mapping[str, Delegation] | None = None,
    predicted_db: Mapping[str, float] | None = None,
    blame: Callable[[str, float], str | None] | None = None,
    on_picture: Callable[[Trajectory, Picture], None] | None = None,
    on_run: Callable[[Trajectory, float], None] | None = None,
) -> ParityReport:
    """Hold one backend's artifacts against `reference`; never raises for what an artifact does wrong.

    A component missing from `executables` is LOWER_FAIL. `blame(component, sqnr gate)` is asked about each component
    that fails; `executed_by` names who executes the artifacts in place of their runtime, `predicted_db` what float16
    arithmetic alone leaves of each component's signal; `on_picture` is given every picture that the compiled loop
    draws, `on_run` the seconds that each took. `gates` defaults to `default_gates()`.
    """
    gates = gates or default_gates()
    threshold = gates.sqnr_db[precision]
    delegations, predicted_db = delegations or {}, predicted_db or {}
    parts = []
    for name in reference.signatures:
        missing = Unavailable(outcome=Outcome.LOWER_FAIL, reason="no artifact was made")
        bound = reference.bounds.get(name)
        least = threshold if bound is None else required_of_plan(bound, threshold)
        part = _component(reference, name, executables.get(name, missing), least)
        part = _with_delegation(part, delegations.get(name), gates.require_full_delegation)
        part = part.model_copy(update={"predicted_db": predicted_db.get(name)})
        if blame is not None and part.outcome is Outcome.MISMATCH:
            part = part.model_copy(update={"blame": blame(name, least)})
        parts.append(part)
    ready = {name: one for name, one in executables.items() if not isinstance(one, Unavailable)}
    pictures: list[PictureParity] = []
    moves: list[SensitivityStep] = []
    notes: list[str] = []
    made: Made = {}
    runs = {part.component for part in parts if part.sqnr_db is not None}
    if runs == set(reference.signatures):
        try:
            for one in reference.trajectories:
                pictures.append(_picture(reference, one, ready, made, on_picture, on_run))
            for pair in reference.pairs:
                moves += _sensitivity(reference, pair, ready, made)
        except ArtifactError as error:
            # Right on the reference's inputs, wrong on its own: a failure of the loop, filed under the denoiser.
            parts = [_failed_in_loop(part, error) if part.component == "denoiser" else part for part in parts]
    elif reference.trajectories:
        absent = ", ".join(f"`{part.component}`" for part in parts if part.sqnr_db is None)
        notes.append(f"no picture was drawn and prompts were not compared: {absent} could not be measured")
    if moves and all(move.degenerate for move in moves):
        notes.append("the reference student itself ignores the prompt: sensitivity has no ratio to compare")
    failed = check(gates, precision, parts, pictures, moves)
    absent_here = any(part.outcome is Outcome.NOT_EXECUTED for part in parts)
    return ParityReport(
        backend=backend,
        precision=precision,
        executed_by=executed_by,
        status="failed" if failed else "not_executed" if absent_here else "passed",
        components=tuple(parts),
        pictures=tuple(pictures),
        sensitivity=tuple(moves),
        gates=gates,
        failed=failed,
        notes=tuple(notes),
    )


def _component(
    reference: Reference, name: str, executable: Executable | Unavailable, threshold: float
) -> ComponentParity:
    if isinstance(executable, Unavailable):
        return ComponentParity(component=name, outcome=executable.outcome, reason=executable.reason)
    signature, samples = reference.signatures[name], reference.expected(name)
    bound = reference.bounds.get(name)
    worst: dict[str, tuple[float, str]] = {}
    to_float = math.inf
    for sample, of_student in zip(samples, reference.samples[name], strict=True):
        try:
            out = call(executable, signature, sample.inputs)
        except ArtifactError as error:
            reason = f"{error.reason} (at {sample.label})"
            return ComponentParity(component=name, outcome=error.outcome, reason=reason)
        for output, expected in sample.outputs.items():
            value = sqnr_db(expected, out[output])
            if output not in worst or value < worst[output][0]:
                worst[output] = (value, sample.label)
            if bound is not None:
                to_float = min(to_float, sqnr_db(of_student.outputs[output], out[output]))
    outputs = tuple(
        OutputParity(output=output, sqnr_db=value, worst_at=label, samples=len(samples))
        for output, (value, label) in worst.items()
    )
    lowest = min((one.sqnr_db for one in outputs), default=-math.inf)
    met = meets(lowest, threshold)
    found = ComponentParity(
        component=name, outcome=Outcome.MISMATCH, sqnr_db=lowest, required_db=threshold, outputs=outputs
    )
    if bound is not None:
        least = required_of_float(bound)
        met = met and meets(to_float, least)
        found = found.model_copy(update={"float_db": to_float, "required_float_db": least})
    return found.model_copy(update={"outcome": Outcome.SUCCESS}) if met else found


def _with_delegation(part: ComponentParity, delegation: Delegation | None, required: bool) -> ComponentParity:
    update: dict[str, object] = {"delegation": delegation}
    nothing = delegation is not None and delegation.known and delegation.delegated_ops == 0
    lacking = required and not (delegation is not None and delegation.full)
    if part.outcome is Outcome.SUCCESS and (nothing or lacking):
        update["outcome"] = Outcome.UNDELEGATED
    return part.model_copy(update=update)


def _failed_in_loop(part: ComponentParity, error: ArtifactError) -> ComponentParity:
    return part.model_copy(update={"outcome": Outcome.RUN_FAIL, "reason": f"{error.reason} (in the compiled loop)"})


def _picture(
    reference: Reference,
    trajectory: Trajectory,
    executables: Mapping[str, Executable],
    made: Made,
    on_picture: Callable[[Trajectory, Picture], None] | None,
    on_run: Callable[[Trajectory, float], None] | None,
) -> PictureParity:
    started = time.perf_counter()
    run = compiled_run(reference, trajectory, executables, made)
    if on_run is not None:
        on_run(trajectory, time.perf_counter() - started)
    if on_picture is not None:
        on_picture(trajectory, to_picture(run.image))
    pairs = zip(trajectory.steps, run.latents, strict=True)
    return PictureParity(
        prompt=trajectory.prompt,
        seed=trajectory.seed,
        steps=len(trajectory.steps),
        psnr_db=picture_psnr_db(trajectory.image, run.image),
        latent_sqnr_db=tuple(sqnr_db(step.latent_out, latent) for step, latent in pairs),
    )


def _sensitivity(
    reference: Reference, pair: Pair, executables: Mapping[str, Executable], made: Made
) -> list[SensitivityStep]:
    signatures = reference.signatures
    heard_a = _condition(executables, reference, pair.a.given, made)
    heard_b = _condition(executables, reference, pair.given_b, made)
    found = []
    for index, (step, expected_b) in enumerate(zip(pair.a.steps, pair.predictions_b, strict=True), start=1):
        denoiser = signatures["denoiser"]
        out_a = _denoise(executables, denoiser, step.model_input, step.coefficients, heard_a, made)
        out_b = _denoise(executables, denoiser, step.model_input, step.coefficients, heard_b, made)
        moved = sensitivity(step.prediction, expected_b, out_a, out_b)
        found.append(
            SensitivityStep(
                prompt_a=pair.a.prompt,
                prompt_b=pair.prompt_b,
                step=index,
                steps=len(pair.a.steps),
                reference_std=moved.reference_std,
                compiled_std=moved.compiled_std,
                output_std=moved.output_std,
                ratio=moved.ratio,
                cosine=moved.cosine,
                degenerate=moved.degenerate,
            )
        )
    return found


def _condition(
    executables: Mapping[str, Executable],
    reference: Reference,
    given: Array,
    made: Made | None = None,
    *,
    keep: bool = False,
) -> dict[str, Array]:
    """What the compiled conditioning component gives, and the scalars beside it."""
    name, signature = reference.conditioning, reference.signatures[reference.conditioning]
    out = _called(executables, name, signature, {signature.inputs[0].name: given}, made, keep=keep)
    return {**out, **scalars(reference.conditions)}


def _first(
    executables: Mapping[str, Executable], signatures: Mapping[str, Signature], name: str, value: Array
) -> Floats:
    """Call a component of one input and one output."""
    given = {signatures[name].inputs[0].name: value}
    return _output(signatures[name], _called(executables, name, signatures[name], given))


def _denoise(
    executables: Mapping[str, Executable],
    signature: Signature,
    latent: Array,
    step: SamplerStep,
    conditioning: Mapping[str, Array],
    made: Made | None = None,
    *,
    keep: bool = False,
) -> Floats:
    given = signature.denoiser_inputs(latent, step, conditioning)
    return _output(signature, _called(executables, "denoiser", signature, given, made, keep=keep))


def _called(
    executables: Mapping[str, Executable],
    name: str,
    signature: Signature,
    given: Mapping[str, Array],
    made: Made | None = None,
    *,
    keep: bool = False,
) -> dict[str, Array]:
    """Outputs of component `name`, copied, as runtimes reuse buffers. With `keep` it is called and `made` remembers
    what it gave; otherwise it is called where `made` does not know the answer to the same numbers."""
    key = _key(name, given) if made is not None else b""
    if made is not None and not keep and key in made:
        return made[key]
    out = call(executables[name], signature, given)
    copied = {spec.name: np.array(out[spec.name]) for spec in signature.outputs}
    if made is not None and keep:
        made[key] = copied
    return copied


def _key(name: str, given: Mapping[str, Array]) -> bytes:
    digest = hashlib.sha256(name.encode())
    for key, value in sorted(given.items()):
        digest.update(f"{key} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.digest()


def _output(signature: Signature, out: Mapping[str, Array]) -> Floats:
    return np.asarray(out[signature.outputs[0].name], dtype=np.float32)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400] if text else type(error).__name__
