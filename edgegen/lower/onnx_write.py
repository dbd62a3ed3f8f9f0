"""Writing a large `.onnx` as one file without holding it in memory.

A protobuf message is built in memory, and with it every weight of the model, once as a message and once as the bytes to
be written. Here the message is built without its large initializers, and these are written into it on the way to the
disk: an `onnx.TensorProto` whose `raw_data` comes straight from the weight's own memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGE_BYTES = 1 << 16
"""Initializers from here on are written by themselves."""
_LENGTH_DELIMITED = 2
# Field numbers of onnx.proto3.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9


@dataclass(frozen=True)
class Written:
    """A model as it was written: the message without its large initializers, and where the bytes of each of those are
    in the file."""

    path: Path
    rest: Any
    """`onnx.ModelProto`."""
    initializers: tuple[Any, ...]
    """`onnx.TensorProto` without data."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @contextmanager
    def referring(self) -> Iterator[Path]:
        """The same model as a small file beside it, whose weights are those in the large one: quick to open."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.rest)
        for tensor, offset, size in zip(self.initializers, self.offsets, self.sizes, strict=True):
            made = model.graph.initializer.add()
            made.CopyFrom(tensor)
            made.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", self.path.name), ("offset", offset), ("length", size)):
                entry = made.external_data.add()
                entry.key, entry.value = key, str(value)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".onnx") as file:
            file.write(model.SerializeToString())
            file.flush()
            yield Path(file.name)


def write_model(model: Any, path: Path) -> Written:
    """Write `model` (an `onnx_ir.Model`, which is as before afterwards) to `path`."""
    import onnx
    import onnx_ir as ir

    kept = dict(model.graph.initializers)
    large = {name: value for name, value in kept.items() if _size(value) >= LARGE_BYTES}
    try:
        for name in large:
            del model.graph.initializers[name]
        rest = ir.serde.serialize_model(model)
    finally:
        model.graph.initializers.clear()
        model.graph.initializers.update(kept)
    headers = []
    for name, value in large.items():
        tensor = value.const_value
        headers.append(onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy()))
    sizes = [_size(value) for value in large.values()]
    heads = [one.SerializeToString() + _field(_TENSOR_RAW_DATA, size) for one, size in zip(headers, sizes, strict=True)]
    graph = rest.graph.SerializeToString()
    around = onnx.ModelProto()
    around.CopyFrom(rest)
    around.ClearField("graph")
    outer = [_field(_GRAPH_INITIALIZER, len(head) + size) for head, size in zip(heads, sizes, strict=True)]
    total = len(graph) + sum(map(len, outer)) + sum(map(len, heads)) + sum(sizes)
    offsets = []
    with path.open("wb") as stream:
        stream.write(around.SerializeToString() + _field(_MODEL_GRAPH, total) + graph)
        for value, field, head, size in zip(large.values(), outer, heads, sizes, strict=True):
            stream.write(field + head)
            offsets.append(stream.tell())
            value.const_value.tofile(stream)
            if stream.tell() - offsets[-1] != size:
                raise ValueError(f"initializer `{value.name}` wrote {stream.tell() - offsets[-1]} bytes of {size}")
    return Written(path, rest, tuple(headers), tuple(offsets), tuple(sizes))


def _size(value: Any) -> int:
    return 0 if value.const_value is None else int(value.const_value.nbytes)


def _field(number: int, length: int) -> bytes:
    """Tag and length of a field that holds `length` bytes."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    made = bytearray()
    while value >= 0x80:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
