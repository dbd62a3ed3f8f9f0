"""Core AI (iOS and macOS 27): an asset (`.aimodel`) made by coreai-torch, executed on the CPU of Linux and on macOS.

The wheel of coreai-core brings a CPU runtime, so what an asset computes can be checked on Linux; how the Neural Engine
rounds, and how fast it is, cannot.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import platform
import re
import sys
import threading
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array, Delegation, Lowered, LowerRequest, Precision
from edgegen.lower.mlir_bytecode import BytecodeError, check_layout, rename_resources
from edgegen.lower.signature import check_call, check_signature, reason

if TYPE_CHECKING:
    from torch.export import ExportedProgram

T = TypeVar("T")
ENTRY = "main"
PROGRAM, DIGEST, METADATA = "main.mlirb", "main.hash", "metadata.json"
# Operations of the asset that compute nothing at run time.
_STATIC = frozenset({"constant", "invoke", "output", "graph"})
_RANDOM_END = re.compile(r"_[a-z]{8}$")
# (system, machine) for which coreai-core is published.
_WHEELS = frozenset({("linux", "x86_64"), ("darwin", "arm64")})


class CoreAIExecutable:
    """A loaded asset behind a synchronous call; the runtime's coroutines run on a thread of their own."""

    def __init__(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self._what = f"`{path.name}`"
        self._inputs = inputs
        self._outputs = outputs
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="coreai", daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()
        self._function: Any = None
        self._open = True
        try:
            self._function = self._wait(self._load(path))
            check_signature(self._what, "inputs", self._described("input"), inputs)
            check_signature(self._what, "outputs", self._described("output"), outputs)
        except EdgegenError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise EdgegenError(f"{self._what} cannot be loaded: {reason(error)}") from error

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _load(self, path: Path) -> Any:
        from coreai.authoring import AIModelAsset

        model = await self._stack.enter_async_context(AIModelAsset.load(path).executable())
        return model.load_function(ENTRY)

    def _described(self, side: Literal["input", "output"]) -> list[TensorSpec]:
        description = self._function.desc
        found = []
        for name in getattr(description, f"{side}_names"):
            tensor = getattr(description, f"{side}_descriptor")(name)
            dtype = str(tensor.dtype).lower()
            if dtype not in ("float32", "int32") or None in tensor.shape:
                raise EdgegenError(f"{self._what} has {side} `{name}` as {dtype}{list(tensor.shape)}")
            found.append(TensorSpec.model_validate({"name": name, "shape": tuple(tensor.shape), "dtype": dtype}))
        return found

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if not self._open:
            raise EdgegenError(f"{self._what} is closed")
        check_call(self._what, inputs, self._inputs)
        try:
            values = self._wait(self._run(inputs))
        except Exception as error:
            raise EdgegenError(f"{self._what} failed while it ran: {reason(error)}") from error
        return {spec.name: values[spec.name] for spec in self._outputs}

    async def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        from coreai.runtime import NDArray

        arrays = {name: NDArray(np.ascontiguousarray(array)) for name, array in inputs.items()}
        values = await self._function(arrays)
        # Copies: the runtime's arrays are views of its own buffers.
        return {name: np.array(value.numpy()) for name, value in values.items()}

    def close(self) -> None:
        """Release the model and end its thread; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        self._function = None
        try:
            self._wait(self._stack.aclose())
            self._wait(self._loop.shutdown_default_executor())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class CoreAIBackend:
    """`.aimodel`; fp16 starts from the half-precision graph, with float32 at its boundary."""

    name = "coreai"
    extra = "coreai"
    suffix = ".aimodel"
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    half: Literal["graph", "converter", "storage"] = "graph"
    quantizes: Literal["graph", "file"] = "graph"
    lower_modules = ("torch", "coreai_torch", "coreai")
    run_modules = ("coreai",)
    distributions = ("torch", "coreai-torch", "coreai-core")

    def lower(self, program: ExportedProgram, request: LowerRequest) -> Lowered:
        """Convert, make the asset's bytes repeatable, check its signature. EdgegenError names the component."""
        from coreai_torch import TorchConverter, get_decomp_table

        from edgegen.lower.coreai_compress import check_plan, compressed
        from edgegen.lower.coreai_read import count_compressed, saved_module
        from edgegen.lower.stored_weight import stored_weights

        check_plan(request.quantized)
        file = f"{request.component}{self.suffix}"
        path = request.out_dir / file
        try:
            stored = stored_weights(program, request.quantized)
            if request.quantized:
                program = compressed(program, stored)
            # RELEASE: operation ids instead of stack traces, which would carry this machine's paths.
            converter = TorchConverter(mode=TorchConverter.Mode.RELEASE).add_exported_program(
                program.run_decompositions(get_decomp_table()),
                input_names=[spec.name for spec in request.inputs],
                output_names=[spec.name for spec in request.outputs],
                entrypoint_name=ENTRY,
            )
            converted = converter.to_coreai()
            _name_functions(converted)
            asset = converted.save_asset(path)
            _make_repeatable(path)
        except Exception as error:
            raise EdgegenError(f"`{request.component}` cannot be lowered to Core AI: {reason(error)}") from error
        self.load(path, request.inputs, request.outputs).close()
        summary = asset.summary(include_statistics=True)
        if summary is None:
            raise EdgegenError(f"`{file}` holds no program")
        facts = json.loads((path / METADATA).read_text())
        census = {name: count for name, count in summary.operation_distribution if name not in _STATIC}
        total = sum(census.values())
        details = {
            "minimum_os": "27.0",
            "asset_version": str(facts.get("assetVersion", "")),
            "producer": str(facts.get("producer", "")),
            "operations": str(total),
            "compute_types": ", ".join(sorted(summary.compute_types)),
        }
        if request.quantized:
            code = (path / PROGRAM).read_bytes()
            details |= count_compressed(saved_module(path), code, request.quantized, stored, f"`{file}`")
            details["weight_bytes"] = str(sum(one.stored_bytes for one in set(stored.values())))
        delegation = Delegation(
            delegate="neural engine, gpu or cpu, as Core AI decides",
            known=False,
            total_ops=total,
            note="executed here by Core AI's CPU runtime, which shows what the asset computes; "
            "which unit takes which operation is decided on the device",
        )
        return Lowered(file=file, delegation=delegation, details=details)

    def not_executed_here(self) -> str | None:
        here = (sys.platform, platform.machine())
        if here in _WHEELS:
            return None
        return f"coreai-core is published for Linux on x86-64 and macOS on Apple silicon only, not for {' '.join(here)}"

    def load(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> CoreAIExecutable:
        """The asset on Core AI's own runtime; EdgegenError when it is damaged or its signature is not the specs'."""
        refusal = self.not_executed_here()
        if refusal is not None:
            raise EdgegenError(f"`{path.name}` cannot be executed on this host: {refusal}")
        # The parser behind the runtime ends the process on some broken files, so look first.
        missing = [name for name in (PROGRAM, DIGEST, METADATA) if not (path / name).is_file()]
        if missing:
            raise EdgegenError(f"`{path.name}` is not a Core AI asset: it has no `{missing[0]}`")
        code = (path / PROGRAM).read_bytes()
        if hashlib.sha256(code).digest() != (path / DIGEST).read_bytes():
            raise EdgegenError(f"`{path.name}` is damaged: its program does not match its own hash")
        try:
            check_layout(code)
        except BytecodeError as error:
            raise EdgegenError(f"`{path.name}` cannot be loaded: its program is no MLIR bytecode: {error}") from error
        return CoreAIExecutable(path, inputs, outputs)


def _name_functions(program: Any) -> None:
    """Name the shared functions of a program after what they are and their order; coreai ends their names at random."""
    from coreai._compiler.ir import SymbolTable  # the one way to rename: coreai exposes no other

    module = program._module._mlir_module
    with module.context:
        symbols = [op for op in module.body.operations if "sym_name" in op.attributes]
        names = [SymbolTable.get_symbol_name(op).value for op in symbols]
        for number, (op, old) in enumerate(zip(symbols, names, strict=True)):
            if _RANDOM_END.search(old) is None:
                continue
            new = f"{_RANDOM_END.sub('', old)}_{_letters(number)}"
            if new in names:
                raise ValueError(f"function `{new}` exists already")
            SymbolTable.replace_all_symbol_uses(old, new, module.operation)
            SymbolTable.set_symbol_name(op, new)


def _letters(number: int) -> str:
    """Eight letters, as coreai's own debugging tools expect at the end of a name."""
    text = ""
    for _ in range(8):
        number, digit = divmod(number, 26)
        text = chr(ord("a") + digit) + text
    return text


def _make_repeatable(asset: Path) -> None:
    """Take out of an asset what differs between two conversions of one program: names of blobs, and the date."""
    program = asset / PROGRAM
    code = rename_resources(program.read_bytes())
    program.write_bytes(code)
    (asset / DIGEST).write_bytes(hashlib.sha256(code).digest())
    metadata = asset / METADATA
    facts = json.loads(metadata.read_text())
    facts.pop("creationDate", None)
    metadata.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


BACKEND = CoreAIBackend()
