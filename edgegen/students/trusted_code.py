"""A student whose network is the user's own Python: `--arch package.module:factory`. The one place that runs such code,
and only what the command line names.

The network is captured as a graph at once. From there on it is what a `.pt2` gives: child processes, caches and
backends meet the graph and never the module.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.archive import read_json, read_small
from edgegen.students.assembly import check_tokenizer, parse_config, require_finite
from edgegen.students.config import ComponentConfig, StudentConfig
from edgegen.students.exported_program import ARCHITECTURE, Program, student_name
from edgegen.students.given_inputs import Arrays
from edgegen.students.load import tensors_of
from edgegen.students.student import DTYPES, Component, Student

log = logging.getLogger(__name__)

TO_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TO_INT32 = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, torch.bool)
NAMED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
ONE_SAMPLE_HINT = (
    "without `example_inputs` of the module, an array of `--inputs` is one input as `forward` takes it; for several "
    "samples give the module `example_inputs`"
)
CAPTURE_HINT = (
    "one graph must serve all inputs: write a branch on values with `torch.where`, and take numbers from shapes, not "
    "from tensors"
)
TRACE_HINT = "the same command after `export EDGEGEN_DEBUG=1` shows the whole way there"
INPUTS_HINT = "say what it takes: `--inputs FILE.npz`, an array for each input by its name in `forward`"


@dataclass(frozen=True)
class Factory:
    """`package.module:factory`, and what it is called with: nothing, or the contents of a JSON file."""

    name: str
    config: Path | None = None


def load_trusted(factory: Factory, weights: Path | None, inputs: Arrays | None = None) -> Student:
    """Import and call the factory, load `weights` (None: as the factory made it) strictly, capture the graph.

    A module becomes a student of task `single`: its inputs are those of its own `example_inputs`, a mapping or a
    function that gives one, or where it has none those of `inputs`, one sample of each. A dict of modules becomes the
    components that the student's config names, which is beside the weights as that of a `.safetensors` is. float16 and
    int64 at the boundary become float32 and int32.

    UsageError for a name that cannot be imported, EdgegenError with the place in the user's code for what it raises.
    """
    if not NAMED.fullmatch(factory.name):
        raise UsageError(
            f"`{factory.name}` is not the name of a function in a module", hint="write `--arch package.module:factory`"
        )
    given = None if factory.config is None else read_json(factory.config)
    log.warning("`%s` is your own code: it is run, and nothing of it is checked", factory.name)
    with _reachable():
        made = _call(factory.name, given)
        if isinstance(made, nn.Module):
            return _single(factory.name, made, weights, inputs)
        if isinstance(made, Mapping) and made and all(isinstance(one, nn.Module) for one in made.values()):
            return _several(factory.name, dict(made), weights)
    raise EdgegenError(
        f"`{factory.name}` gave {made.__class__.__name__!r}, not an `nn.Module` or a dict of them by component",
        hint="name a function that makes the network and returns it",
    )


@contextmanager
def _reachable() -> Iterator[None]:
    """The current folder on Python's path, while the user's code is imported and run."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _call(name: str, config: Mapping[str, Any] | None) -> Any:
    module_name, _, function_name = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module `{module_name}`", hint="run this in the folder that holds it, or install it"
            ) from error
        raise _raised(name, "import", error, TRACE_HINT) from error
    except AttributeError as error:
        raise UsageError(
            f"module `{module_name}` has no `{function_name}`",
            hint=f"`python -c 'import {module_name} as m; print(dir(m))'` lists what it has",
        ) from error
    except Exception as error:
        raise _raised(name, "import", error, TRACE_HINT) from error
    return _guarded(name, "call", lambda: factory() if config is None else factory(config))


def _guarded(name: str, what: str, call: Callable[[], Any], hint: str | None = None) -> Any:
    try:
        return call()
    except Exception as error:
        raise _raised(name, what, error, hint or TRACE_HINT) from error


def _raised(name: str, what: str, error: Exception, hint: str) -> EdgegenError:
    """What the user's code raised, with its own file and line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if "importlib" not in frame.filename and "site-packages" not in frame.filename]
    at = f" (`{Path((own or frames)[-1].filename).name}`, line {(own or frames)[-1].lineno})" if frames else ""
    said = " ".join(str(error).split())[:300]
    return EdgegenError(f"{what} of `{name}` raised {type(error).__name__}: {said}{at}", hint)


def _single(name: str, module: nn.Module, weights: Path | None, inputs: Arrays | None) -> Student:
    if weights is not None:
        _fill(name, module, tensors_of(weights), weights.name)
    own = getattr(module, "example_inputs", None)
    given = _own_examples(name, own) if own is not None else dict(inputs or {})
    if not given:
        raise UsageError(f"nothing says what the module of `{name}` takes", hint=INPUTS_HINT)
    example = {}
    for key, array in given.items():
        tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
        example[key] = tensor
    _guarded(name, "example_inputs", lambda: [_bounded(value, f"input `{key}`") for key, value in example.items()])
    part = _captured("model", name, module, example, None, None if own is not None else ONE_SAMPLE_HINT)
    shown = student_name(weights.stem if weights is not None else name.rpartition(":")[2])
    config = StudentConfig(name=shown, task="single", components={"model": _described(part)})
    return Student(config, {"model": part})


def _own_examples(name: str, own: Any) -> dict[str, Any]:
    found = _guarded(name, "example_inputs", own) if callable(own) else own
    if not isinstance(found, Mapping) or not found:
        raise EdgegenError(f"`example_inputs` of the module of `{name}` is not a mapping of tensors by name")
    return dict(found)


def _several(name: str, modules: dict[str, nn.Module], weights: Path | None) -> Student:
    if weights is None:
        raise UsageError(
            f"`{name}` gave several components, whose config must be beside weights", hint="name their file as MODEL"
        )
    candidates = (weights.with_name(f"{weights.stem}.json"), weights.with_name("config.json"))
    path = next((one for one in candidates if one.is_file()), None)
    if path is None:
        raise EdgegenError(
            f"`{weights.name}` has no config: neither `{candidates[0].name}` nor `config.json` is beside it",
            hint="`edgegen/students/shapes/weights/shapes.json` is an example; its `architecture` is not looked at",
        )
    config = parse_config(read_json(path), path.name)
    tokenizer_path = path.with_name("tokenizer.json")
    tokenizer = read_small(tokenizer_path).decode("utf-8") if tokenizer_path.is_file() else None
    if config.conditioning == "text_encoder":
        check_tokenizer(tokenizer, weights.name, config.components["text_encoder"].inputs[0].shape[-1])
    if set(modules) != set(config.components):
        raise EdgegenError(
            f"`{name}` gave components {sorted(modules)}, and `{path.name}` names {list(config.components)}"
        )
    state = tensors_of(weights)
    parts, described = {}, {}
    for component, module in modules.items():
        nested = state.get(component)
        own = nested if isinstance(nested, Mapping) else _below(state, component)
        _fill(name, module, own, f"{weights.name}, component `{component}`")
        stated = config.components[component]
        example = {spec.name: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]) for spec in stated.inputs}
        part = _captured(component, name, module, example, [spec.name for spec in stated.outputs])
        if part.outputs != stated.outputs:
            raise EdgegenError(f"component `{component}` gives {part.outputs}, and `{path.name}` says {stated.outputs}")
        parts[component] = part
        described[component] = _described(part)
    ordered = {component: parts[component] for component in config.components}
    made = config.model_copy(update={"components": {key: described[key] for key in config.components}})
    return Student(made, ordered, tokenizer)


def _below(state: Mapping[str, object], component: str) -> dict[str, object]:
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _fill(name: str, module: nn.Module, state: Mapping[str, object], where: str) -> None:
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise EdgegenError(
            f"`{where}` is not a state dict of tensors", hint="`torch.save(module.state_dict(), 'weights.pt')`"
        )
    try:
        module.load_state_dict(dict(state), strict=True)
    except Exception as error:  # strict loading raises RuntimeError, a module of the user's anything
        said = " ".join(str(error).split())[:300]
        raise EdgegenError(
            f"`{where}` does not fit the module of `{name}`: {said}",
            hint="the factory is called with `--arch-config FILE.json`: the sizes of the training run belong there",
        ) from error


def _captured(
    component: str,
    name: str,
    module: nn.Module,
    example: Mapping[str, Tensor],
    outputs: Sequence[str] | None,
    hint: str | None = None,
) -> Component:
    module = _guarded(name, "eval", lambda: module.float().eval().requires_grad_(False))
    wrapped = _Bounded(module, {key: value.dtype for key, value in example.items()}, outputs)
    stated = {
        key: value.to(torch.int32 if value.dtype in TO_INT32 else torch.float32) for key, value in example.items()
    }
    with torch.no_grad(), warnings.catch_warnings():
        # A GRU or LSTM lists its weights anew at every call; they are its parameters all the same.
        warnings.filterwarnings("ignore", message=r"The tensor attributes .* assigned during export")
        made = _guarded(name, "forward", lambda: wrapped(*stated.values()), hint)
        program = _guarded(name, "capture", lambda: torch.export.export(wrapped, tuple(stated.values())), CAPTURE_HINT)
    named = zip(wrapped.names or [], made, strict=True)
    part = Component(
        component,
        Program(program.module(check_guards=False), program.graph_module.code),
        tuple(_spec(key, value) for key, value in stated.items()),
        tuple(_spec(key, value) for key, value in named),
    )
    require_finite(component, part.module, name)
    return part


class _Bounded(nn.Module):
    """The user's module with float32 and int32 at its boundary, inputs by name where it names them so."""

    def __init__(self, inner: nn.Module, dtypes: Mapping[str, torch.dtype], outputs: Sequence[str] | None) -> None:
        import inspect

        super().__init__()
        self.inner = inner
        self.dtypes = dict(dtypes)
        self.names: list[str] | None = None if outputs is None else list(outputs)
        taken = inspect.signature(inner.forward).parameters
        self.by_name = all(key in taken for key in dtypes)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        floats = (torch.float16, torch.bfloat16, torch.float64)
        given = {
            key: value if dtype in floats else value.to(dtype)
            for (key, dtype), value in zip(self.dtypes.items(), inputs, strict=True)
        }
        made = self.inner(**given) if self.by_name else self.inner(*given.values())
        if isinstance(made, Mapping):
            names, values = [str(key) for key in made], list(made.values())
        elif isinstance(made, Tensor):
            names, values = ["output"], [made]
        else:
            values = list(made)
            names = list(getattr(made, "_fields", ())) or [f"output_{i}" for i in range(len(values))]
        self.names = self.names or names
        return tuple(_bounded(value, f"output `{key}`", cast=True) for key, value in zip(names, values, strict=True))


def _bounded(value: Any, what: str, *, cast: bool = False) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}, not a tensor")
    if value.dtype not in (*TO_FLOAT32, *TO_INT32):
        raise TypeError(f"{what} is {value.dtype}, neither real nor integer")
    if not cast:
        return value
    return value.to(torch.int32 if value.dtype in TO_INT32 else torch.float32)


def _spec(name: str, value: Tensor) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(value.shape), dtype="int32" if value.dtype == torch.int32 else "float32")


def _described(part: Component) -> ComponentConfig:
    return ComponentConfig(architecture=ARCHITECTURE, config={}, inputs=part.inputs, outputs=part.outputs)
