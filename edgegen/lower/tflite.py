"""TFLite: litert_torch's converter over the exported program, executed by ai_edge_litert with its XNNPACK delegate.

fp16 is storage: ai-edge-quantizer casts the weights of convolutions, fully connected layers and embeddings of the
float32 model to float16 behind DEQUANTIZE. That is the form which every TFLite runtime knows: XNNPACK and the CPU
kernels unpack it and compute in float32; what a GPU delegate computes in is its own choice, and is not shown here. So
parity measured on a CPU speaks of float16 weights, not of float16 arithmetic.

The program goes to the converter as it is, through the same functions that `litert_torch.convert` calls: `convert`
itself would trace once more, which costs time and loses the module paths that name the tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgegen.cores import cores
from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Array, Delegation, Lowered, LowerRequest, Precision
from edgegen.lower.collection import without_collection
from edgegen.lower.mapped_weights import release_pages
from edgegen.lower.signature import check_call, check_product, check_signature, reason
from edgegen.lower.tflite_file import marked
from edgegen.lower.tflite_quantize import QuantizedFile, quantize_file, refuse_unrunnable

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SIGNATURE = "serving_default"
DELEGATE = "XNNPACK"
FILE_LIMIT = 2**31 - 1
HALF_OPS = ("CONV_2D", "CONV_2D_TRANSPOSE", "DEPTHWISE_CONV_2D", "EMBEDDING_LOOKUP", "FULLY_CONNECTED")


class TfliteExecutable:
    """An interpreter's signature: named arrays in, named arrays out."""

    def __init__(self, interpreter: Any, what: str, inputs: tuple[TensorSpec, ...]) -> None:
        self._interpreter = interpreter
        self._runner = interpreter.get_signature_runner(SIGNATURE)
        self._what = what
        self._inputs = inputs

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._runner is None:
            raise EdgegenError(f"{self._what} is closed")
        check_call(self._what, inputs, self._inputs)
        try:
            values: dict[str, Array] = self._runner(**inputs)
        except Exception as error:
            raise EdgegenError(f"{self._what} failed while it ran: {reason(error)}") from error
        return values

    def delegation(self) -> Delegation:
        """How the interpreter of this host cut the graph."""
        return _delegation(self._interpreter)

    def close(self) -> None:
        self._runner = None
        self._interpreter = None


class TfliteBackend:
    """`.tflite` with one signature, `serving_default`, whose names are the specs'."""

    name = "tflite"
    extra = "tflite"
    suffix = ".tflite"
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    half: Literal["graph", "converter", "storage"] = "storage"
    quantizes: Literal["graph", "file"] = "file"
    lower_modules = ("torch", "litert_torch", "litert_converter", "ai_edge_litert", "ai_edge_quantizer")
    run_modules = ("ai_edge_litert",)
    distributions = ("torch", "litert-torch", "litert-converter", "ai-edge-quantizer", "ai-edge-litert")

    def lower(self, program: ExportedProgram, request: LowerRequest) -> Lowered:
        """Convert, cast for fp16, read the signature back, count delegates. EdgegenError names the component."""
        file = f"{request.component}{self.suffix}"
        path = request.out_dir / file
        try:
            refuse_unrunnable(program, request.quantized)
            named = marked(program, request.quantized) if request.quantized else program
            made: QuantizedFile | None = None
            cast: Counter[str] = Counter()
            if request.quantized:
                content, refusals = _convert(named, request)
                made = quantize_file(content, program, request.quantized, request.precision)
                cast = _readers_of_half(made.content) if request.precision == "fp16" else cast
                path.write_bytes(made.content)
            else:
                refusals = _convert_to_file(named, request, path)
                if request.precision == "fp16":
                    cast = _half_weights(path, path)
        except EdgegenError:
            raise
        except Exception as error:
            raise EdgegenError(f"`{request.component}` cannot be lowered to TFLite: {reason(error)}") from error
        return self._described(path, request, cast, made, refusals)

    def halve(self, source: Path, request: LowerRequest) -> Lowered:
        """What `lower` gives for fp16, from what it gave for fp32: only the weights are cast. The same bytes."""
        path = request.out_dir / f"{request.component}{self.suffix}"
        try:
            cast = _half_weights(source, path)
        except Exception as error:
            raise EdgegenError(f"`{request.component}` cannot be cast to float16: {reason(error)}") from error
        return self._described(path, request, cast, None, ())

    def _described(
        self,
        path: Path,
        request: LowerRequest,
        cast: Counter[str],
        made: QuantizedFile | None,
        refusals: Sequence[str],
    ) -> Lowered:
        check_product(request.component, path)
        if path.stat().st_size > FILE_LIMIT:
            raise EdgegenError(f"`{request.component}` does not fit into a TFLite file of 2 GB")
        executable = self.load(path, request.inputs, request.outputs)
        delegation = executable.delegation()
        executable.close()
        details = {"signature": SIGNATURE, "float16": "none"}
        notes: tuple[str, ...] = ()
        if request.precision == "fp16":
            details["float16"] = "weights only; arithmetic is float32 on the CPU"
            details["cast_to_float16"] = _counts(cast)
            notes = (
                "weights are stored in float16 and unpacked by the runtime; "
                "norms, biases and all arithmetic on the CPU stay float32: "
                "parity measured here is that of float16 weights, not of float16 arithmetic",
            )
        if made is not None:
            details["int8_ops"] = _counts(made.int8_ops)
            details["compressed_weights"] = _counts(made.compressed_weights)
        notes += tuple(f"decomposed as a whole, which takes longer: {refusal}" for refusal in refusals)
        return Lowered(file=path.name, delegation=delegation, details=details, notes=notes)

    def not_executed_here(self) -> str | None:
        return None

    def load(self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> TfliteExecutable:
        """An interpreter on all of this process's CPUs; EdgegenError for a broken file or a wrong signature."""
        what = f"`{path.name}`"
        interpreter = _interpreter(path)
        signatures = interpreter._get_full_signature_list()
        if SIGNATURE not in signatures:
            raise EdgegenError(f"{what} has no signature `{SIGNATURE}`")
        tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
        for side, specs in (("inputs", inputs), ("outputs", outputs)):
            found = [_spec(name, tensors[index], what) for name, index in signatures[SIGNATURE][side].items()]
            check_signature(what, side, found, specs)
        return TfliteExecutable(interpreter, what, inputs)

    def intermediate_values(self, path: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Every tensor of the first subgraph after one run without delegates, by its name: module path, then `;n`.

        Names are not those of fx nodes: the converter fuses and splits them. Layout follows TFLite, channels last.
        """
        from ai_edge_litert.interpreter import OpResolverType

        interpreter = _interpreter(
            path,
            experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
        interpreter.get_signature_runner(SIGNATURE)(**inputs)
        produced = {int(index) for op in interpreter._get_ops_details() for index in op["outputs"]}
        return {
            tensor["name"]: interpreter.get_tensor(tensor["index"])
            for tensor in interpreter.get_tensor_details()
            if tensor["index"] in produced
        }


@dataclass(frozen=True)
class _Names:
    """The part of litert_torch's Signature that the exporter reads."""

    name: str
    flat_arg_names: list[str]


def _convert(program: ExportedProgram, request: LowerRequest) -> tuple[bytes, tuple[str, ...]]:
    """The flatbuffer, and why it was decomposed the slow way where it was."""
    with without_collection():
        exporter, refusals = _exporter(program, request)
        content: bytes = exporter.to_bytes()
    return content, refusals


def _convert_to_file(program: ExportedProgram, request: LowerRequest, path: Path) -> tuple[str, ...]:
    """As `_convert`, written by the converter itself: the flatbuffer is not held a second time."""
    with without_collection():
        exporter, refusals = _exporter(program, request)
        exporter.to_file(str(path))
    return refusals


def _exporter(program: ExportedProgram, request: LowerRequest) -> tuple[Any, tuple[str, ...]]:
    """`litert_torch.convert` from its second step on: decompose, its graph passes, MLIR; what writes the flatbuffer."""
    from litert_torch import fx_infra
    from litert_torch._convert import core, litert_converter
    from torch.utils import _pytree as pytree

    from edgegen.graph.edit import private_program

    fx_infra.silence_torch_logs()
    with _local_decompositions() as refusals, _weights_left_alone():
        decomposed = fx_infra.safe_run_decompositions(
            private_program(program), fx_infra.decomp.pre_convert_decomp(), can_skip=False
        )
        ready = core._run_convert_passes(decomposed)
        # Output names are read from the structure of what the program returns: a dict gives its keys.
        entry = ready.module_call_graph[0]
        named = pytree.tree_structure({spec.name: 0 for spec in request.outputs})
        assert entry.signature is not None
        ready.module_call_graph[0] = replace(entry, signature=replace(entry.signature, out_spec=named))
        names = _Names(SIGNATURE, [spec.name for spec in request.inputs])
        exporter = litert_converter.exported_programs_to_flatbuffer([ready], [names])
    return exporter, tuple(dict.fromkeys(refusals))


@contextmanager
def _weights_left_alone() -> Iterator[None]:
    """litert_torch clamps each weight in place before it copies it, which makes a copy of every mapped page; here only
    one that has an infinity is. Once all are copied, the memory of the originals is given back."""
    import torch
    from litert_torch.backend import export, inline_consts

    clamp: Any = inline_consts._clamp_inf_values
    lower: Any = export.exported_program_to_mlir

    def clamp_where_needed(tensor: Any) -> Any:
        return clamp(tensor) if torch.isinf(tensor).any() else tensor

    def lower_and_let_go(*args: Any, **kwargs: Any) -> Any:
        made = lower(*args, **kwargs)
        release_pages()
        return made

    inline_consts._clamp_inf_values = clamp_where_needed
    export.exported_program_to_mlir = lower_and_let_go
    try:
        yield
    finally:
        inline_consts._clamp_inf_values = clamp
        export.exported_program_to_mlir = lower


@contextmanager
def _local_decompositions() -> Iterator[list[str]]:
    """Let litert_torch decompose through `expand`, call by call.

    It decomposes four times on its way, each time the whole program, which is most of a conversion's time. A program
    that `expand` refuses goes the old way, and the list that is given says why. EdgegenError when litert_torch no
    longer has the function that is exchanged.
    """
    from litert_torch import fx_infra

    from edgegen.lower.expand import NotExpandable, expand, needs_expansion

    home: Any = getattr(fx_infra, "_safe_run_decompositions", None)
    found = getattr(home, "safe_run_decompositions", None)
    if found is None or getattr(fx_infra, "safe_run_decompositions", None) is not found:
        raise EdgegenError(
            "litert_torch has no `fx_infra.safe_run_decompositions` any more, which its conversion went through",
            hint="install the litert-torch that `edgegen doctor` names",
        )

    whole: Any = found
    refusals: list[str] = []

    def local(program: ExportedProgram, table: Mapping[Any, Any] | None = None, can_skip: bool = True) -> Any:
        if table is None:
            return whole(program, table, can_skip)
        decompositions = dict(table.items())
        if can_skip and not needs_expansion(program, decompositions):
            return program
        try:
            return expand(program, decompositions)
        except NotExpandable as refusal:
            refusals.append(str(refusal))
            return whole(program, table, can_skip)

    modules: tuple[Any, ...] = (home, fx_infra)
    for module in modules:
        module.safe_run_decompositions = local
    try:
        yield refusals
    finally:
        for module in modules:
            module.safe_run_decompositions = whole


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counter.items())) or "nothing"


def _half_weights(source: Path, path: Path) -> Counter[str]:
    """Write the model of `source` with float16 weights to `path`; how many operators of each kind read one."""
    from ai_edge_quantizer import qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    caster = quantizer.Quantizer(source.read_bytes())
    for op in HALF_OPS:
        caster.add_weight_only_config(
            ".*", qtyping.TFLOperationName[op], num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING
        )
    result = caster.quantize(enable_progress_bar=False, enable_progress_report=False)
    made = bytes(result.quantized_model)
    path.write_bytes(made)
    return _readers_of_half(made)


def _readers_of_half(content: bytes) -> Counter[str]:
    """Operators that read an unpacked float16 constant; the quantizer skips in silence what it does not know."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=content, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    ops = interpreter._get_ops_details()
    unpacked = {
        int(op["outputs"][0]) for op in ops if op["op_name"] == "DEQUANTIZE" and op["operand_types"][0] is np.float16
    }
    return Counter(op["op_name"] for op in ops if unpacked.intersection(int(index) for index in op["inputs"]))


def _delegation(interpreter: Any) -> Delegation:
    """How the interpreter of this host cut the graph.

    Nodes that a delegate took stay listed beside the node that replaced them. They are those reached backwards from the
    delegate's outputs without passing its inputs.
    """
    ops = interpreter._get_ops_details()
    delegates = [op for op in ops if op["op_name"] == "DELEGATE"]
    originals = [op for op in ops if op["op_name"] != "DELEGATE"]
    producer = {int(tensor): op["index"] for op in originals for tensor in op["outputs"]}
    reads = {op["index"]: [int(tensor) for tensor in op["inputs"]] for op in originals}
    taken: set[int] = set()
    for delegate in delegates:
        edge = {int(tensor) for tensor in delegate["inputs"]}
        queue = [int(tensor) for tensor in delegate["outputs"]]
        while queue:
            tensor = queue.pop()
            op = producer.get(tensor)
            if tensor in edge or op is None or op in taken:
                continue
            taken.add(op)
            queue += reads[op]
    outside = Counter(op["op_name"] for op in originals if op["index"] not in taken)
    return Delegation(
        delegate=DELEGATE,
        known=True,
        delegated_ops=len(taken),
        total_ops=len(originals),
        pieces=len(delegates),
        undelegated=dict(sorted(outside.items())),
        note="as this host's interpreter cut the graph; a GPU or NPU delegate of a phone was not asked",
    )


def _interpreter(path: Path, **options: Any) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    if not path.is_file():
        raise EdgegenError(f"`{path.name}` does not exist")
    try:
        # The runtime verifies the flatbuffer itself before it reads it.
        interpreter = Interpreter(model_path=str(path), num_threads=cores(), **options)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise EdgegenError(
            f"`{path.name}` cannot be loaded by TFLite: {reason(error)}",
            hint="the file may be damaged: build it again, or install the ai-edge-litert that its manifest names",
        ) from error
    return interpreter


def _spec(name: str, tensor: Mapping[str, Any], what: str) -> TensorSpec:
    dtype = np.dtype(tensor["dtype"]).name
    shape: Sequence[int] = tensor["shape"]
    if dtype not in ("float32", "int32"):
        raise EdgegenError(f"{what} has `{name}` as {dtype}{list(shape)}, not a tensor of a known type")
    return TensorSpec.model_validate({"name": name, "shape": tuple(int(size) for size in shape), "dtype": dtype})


BACKEND = TfliteBackend()
