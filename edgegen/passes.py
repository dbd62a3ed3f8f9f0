"""The rewrites as a user meets them: described, and run on one network outside a build."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import shlex
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.rewrite.pipeline import PassRecord

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from edgegen.build.trial import Trial
    from edgegen.rewrite.base import Pass
    from edgegen.rewrite.observe import Verify
    from edgegen.rewrite.pipeline import Pipeline
    from edgegen.students.student import Component


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class OptionFacts(_Model):
    """`default` None with `required`: it must be given."""

    name: str
    type: str
    required: bool
    default: Any = None
    says: str = ""


class PassFacts(_Model):
    name: str
    says: str
    """The first paragraph of its docstring."""
    tolerance: float
    options: tuple[OptionFacts, ...]
    after: tuple[str, ...]
    needs: tuple[str, ...]
    changes_signature: bool


class PassRun(_Model):
    """What a pipeline did to one component; `errors`: the worst relative error of each pass, when asked for."""

    component: str
    passes: tuple[PassRecord, ...]
    inputs: tuple[TensorSpec, ...]
    errors: dict[str, float] | None
    lowered_db: float | None
    """SQNR of the lowered result against the graph, when that was asked for; infinite for the same bits."""
    written: str | None


def list_passes() -> tuple[PassFacts, ...]:
    """Every pass, by name."""
    from edgegen.rewrite.registry import all_passes

    return tuple(describe(kind) for kind in all_passes().values())


def describe(kind: type[Pass]) -> PassFacts:
    """What a pass says of itself."""
    options = []
    said = _said_of_fields(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING
        options.append(
            OptionFacts(
                name=field.name,
                type=str(field.type),
                required=required,
                default=None if required else field.default,
                says=said.get(field.name, ""),
            )
        )
    first = (inspect.getdoc(kind) or "").split("\n\n")[0]
    return PassFacts(
        name=kind.name,
        says=" ".join(first.split()),
        tolerance=kind.tolerance,
        options=tuple(options),
        after=kind.after,
        needs=kind.needs,
        changes_signature=kind.changes_signature,
    )


def docstring(kind: type[Pass]) -> str:
    """All that a pass says of itself: the graph before and after, and when it declines."""
    return inspect.getdoc(kind) or ""


def _said_of_fields(kind: type[Pass]) -> dict[str, str]:
    """The string under each field, which Python keeps in the source alone; {} where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    said = {}
    for one, following in itertools.pairwise(body):
        if not isinstance(one, ast.AnnAssign) or not isinstance(one.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            said[one.target.id] = " ".join(str(following.value.value).split())
    return said


@dataclasses.dataclass(frozen=True)
class PassRequest:
    """`inputs`: a safetensors file of the component's inputs by name, else the component's example inputs. `shrink`: a
    folder for the smallest graph on which the pass that failed still fails."""

    model: Path
    component: str | None
    passes: str
    inputs: Path | None = None
    dump_ir: Path | None = None
    verify: bool = False
    shrink: Path | None = None
    output: Path | None = None
    lower: str | None = None
    """`backend` or `backend:precision`: lower the result, execute it, and hold it against the graph."""


def run_passes(request: PassRequest, progress: Callable[[str], None] | None = None) -> PassRun:
    """Run passes on one component of a model as `load` reads it; a `.pt2` is checked before it is opened.

    Raises what loading raises, UsageError for a component or pass that is not there and for inputs that do not fit,
    PassError for a pass that breaks its promise; with `verify` GateError for one that is beyond its tolerance.
    """
    from edgegen.graph.capture import capture, signature
    from edgegen.rewrite.observe import Dump, Verify
    from edgegen.rewrite.pipeline import Observer, Pipeline
    from edgegen.rewrite.registry import parse

    if request.output is not None and request.output.suffix != ".pt2":
        raise UsageError(f"`{request.output}` does not end in `.pt2`", hint=f"`-o {request.output.stem}.pt2`")
    pipeline = Pipeline(() if request.passes == "none" else parse(request.passes))
    trial = None if request.lower is None else _trial(request.lower)
    component = _component(request.model, request.component)
    program = capture(component)
    inputs = _inputs(request.inputs, component)
    watched = request.verify or request.shrink is not None or trial is not None
    verify = Verify(inputs) if watched else None
    observers: list[Observer] = [] if request.dump_ir is None else [Dump(request.dump_ir)]
    observers += [] if verify is None else [verify]
    try:
        made, records = pipeline.run(program, observers)
    except EdgegenError as error:
        if request.shrink is not None and verify is not None:
            script = shrink(pipeline, program, verify, error, request.shrink, progress)
            error.hint = f"`sh {shlex.quote(str(script))}` shows it on the smallest graph"
        raise
    if request.output is not None:
        _write(made, request.output)
    return PassRun(
        component=component.name,
        passes=records,
        inputs=signature(made),
        lowered_db=None if trial is None else _held(trial, made, verify.inputs if verify is not None else inputs),
        errors=None if verify is None else verify.errors,
        written=None if request.output is None else str(request.output),
    )


def _trial(text: str) -> Trial:
    """`onnx` or `onnx:fp16`; UsageError for a backend or precision that there is not."""
    from edgegen.build.trial import Trial
    from edgegen.lower.backend import get_backend

    backend, _, precision = text.partition(":")
    known = get_backend(backend)
    if precision not in ("", *known.precisions):
        hint = " or ".join(f"`--lower {backend}:{one}`" for one in known.precisions)
        raise UsageError(f"backend `{backend}` has no precision `{precision}`", hint=f"use {hint}")
    return Trial(backend, "fp16" if precision == "fp16" else "fp32", {})


def _held(trial: Trial, program: ExportedProgram, inputs: Mapping[str, Tensor]) -> float:
    """SQNR of the lowered graph; GateError below what a build asks of a component."""
    from edgegen.errors import GateError
    from edgegen.verify.gates import decibels, default_gates, meets

    found, required = trial.sqnr_db(program, inputs), default_gates().sqnr_db[trial.precision]
    if not meets(found, required):
        raise GateError(f"`{trial.backend}` {trial.precision} gives {decibels(found)}, required >= {required:g} dB")
    return found


def shrink(
    pipeline: Pipeline,
    program: ExportedProgram,
    verify: Verify,
    error: BaseException,
    folder: Path,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Reduce the graph on which a pass of `pipeline` failed with `error` while `verify` watched; the script's path."""
    from edgegen.rewrite.reduce import pass_fails, reduce, save

    failing = pipeline.passes[verify.seen]
    given = verify.program if verify.program is not None and verify.seen else program
    told = None if progress is None else lambda ops, asked: progress(f"{ops} ops still fail after {asked} tries")
    reduced = reduce(given, verify.inputs, pass_fails(failing, error), progress=told)
    return save(reduced, folder, str(failing))


def _component(path: Path, name: str | None) -> Component:
    from edgegen.students.load import load

    components = load(path).components
    known = ", ".join(f"`{one}`" for one in components)
    if name is None:
        if len(components) > 1:
            raise UsageError(f"`{path}` has several components", hint=f"`--component` with one of {known}")
        return next(iter(components.values()))
    if name not in components:
        raise UsageError(f"`{path}` has no component `{name}`", hint=f"`--component` with one of {known}")
    return components[name]


def _inputs(path: Path | None, component: Component) -> Mapping[str, Tensor]:
    specs = component.inputs
    if path is None:
        return {spec.name: value for spec, value in zip(specs, component.example_inputs(), strict=True)}
    from edgegen.students.safetensors_file import read_tensors

    held = read_tensors([path])
    found = {}
    for spec in specs:
        value = held.get(spec.name)
        wanted = f"{spec.dtype}{list(spec.shape)}"
        if value is None:
            raise UsageError(f"`{path}` has no tensor `{spec.name}`", hint=f"it is to be {wanted}")
        if tuple(value.shape) != spec.shape or str(value.dtype) != f"torch.{spec.dtype}":
            raise UsageError(
                f"`{spec.name}` in `{path}` is {str(value.dtype).removeprefix('torch.')}{list(value.shape)}",
                hint=f"`{component.name}` takes {wanted}",
            )
        found[spec.name] = value
    return found


def _write(program: ExportedProgram, path: Path) -> None:
    """Whole or not at all."""
    import torch

    try:
        with tempfile.TemporaryDirectory(prefix=".edgegen-", dir=path.parent) as folder:
            private = Path(folder) / "program.pt2"
            torch.export.save(program, private)
            private.replace(path)
    except (OSError, RuntimeError) as error:  # torch's zip writer tells a full disk as a RuntimeError
        raise EdgegenError(f"`{path}` cannot be written: {' '.join(str(error).split())[:200]}") from error
