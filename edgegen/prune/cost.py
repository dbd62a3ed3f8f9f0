"""What a network costs at every width: MACs and bytes, which are exact, and latency, which is an estimate.

Latency starts from kernels timed on this machine's runtime at a few widths (`edgegen.prune.bench`). A surface through
them, in what is read and what is written, says the time at any other width; the precision of an op scales it by the
target file's table. In milliseconds of the target it is scaled once more by what the target file says of its
throughput; a target that says nothing has ratios only. Whatever comes of this is called estimated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.count import macs_of, op_name
from edgegen.graph.edit import module_path, user_inputs
from edgegen.prune.bench import Point
from edgegen.prune.kernels import Kernel, kernel_of
from edgegen.prune.search import Ladder, Part, Work
from edgegen.prune.space import Space, Spaces

Sizes = NDArray[np.float64]
Kept = Mapping[str, Sequence[Sequence[int]]]
"""Space -> the units that stay at each of its levels."""


@dataclass(frozen=True)
class Surface:
    """Milliseconds = constant + read * r + written * w + product * r * w, none negative: never faster when wider.

    `error`: the greatest difference from a measured time, as a share of it."""

    constant: float
    read: float
    written: float
    product: float
    error: float

    def __call__(self, read: float, written: float) -> float:
        return self.constant + self.read * read + self.written * written + self.product * read * written


def points(kernel: Kernel, read: int, written: int, multiple: int) -> tuple[Point, ...]:
    """Where a kernel that occurs up to these widths is timed."""
    step = math.lcm(kernel.step, 1 if kernel.kind == "attention" else multiple)

    def near(size: float) -> int:
        return max(step, round(size / step) * step)

    if not kernel.two_sided:
        found = [(near(share * written),) * 2 for share in (1.0, 0.5, 0.25)]
    else:
        shares = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (0.25, 0.25))
        found = [(near(a * read), near(b * written)) for a, b in shares]
    return tuple(Point(kernel=kernel, read=r, written=w) for r, w in dict.fromkeys(found))


def surface(measured: Mapping[Point, float]) -> Surface:
    """The surface nearest to times at several widths of one kernel, each difference as a share of its time."""
    two_sided = all(point.kernel.two_sided for point in measured)
    times = np.array(list(measured.values()))
    columns = np.array(
        [[1.0, p.read, p.written, p.read * p.written] if two_sided else [1.0, 0.0, p.written, 0.0] for p in measured]
    )
    found, _ = nnls(columns / times[:, None], np.ones(len(times)))
    error = float(np.abs(columns @ found / times - 1).max())
    constant, read, written, product = (float(one) for one in found)
    return Surface(constant, read, written, product, error)


@dataclass(frozen=True)
class Piece:
    """Positions of a dimension that one space owns: so many for each of its units; of no space: `each` is one number
    and nothing changes it."""

    space: str | None
    each: Sizes

    def sizes(self, kept: Kept) -> Sizes:
        """Positions that are left at each level; one number for what has no levels."""
        if self.space is None or self.space not in kept:
            return np.array([self.each.sum()])
        return np.array([self.each[list(units)].sum() for units in kept[self.space]])

    def scaled(self, factor: float) -> Piece:
        return Piece(self.space, self.each * factor)


Side = tuple[Piece, ...]


def width(side: Side) -> float:
    """Of the whole."""
    return float(sum(piece.each.sum() for piece in side))


@dataclass(frozen=True)
class Op:
    """A call of the captured graph that costs anything. `folded`: it depends on the time alone, and passes compute it
    beforehand."""

    name: str
    """Module path, `#2` after it for the second call of a module."""
    path: str
    kernel: Kernel | None
    read: Side
    written: Side
    macs: int
    weight: int = 0
    """Elements."""
    folded: bool = False


def ops(program: ExportedProgram, spaces: Spaces) -> tuple[Op, ...]:
    """In the order of the captured graph."""
    reader = _Reader(program, spaces)
    seen: dict[str, int] = {}
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        kernel, macs = kernel_of(node), macs_of(node)
        if kernel is None and not macs:
            continue
        path = ".".join(part.split("@")[0] for part in module_path(node).split("."))
        seen[path] = seen.get(path, 0) + 1
        name = path if seen[path] == 1 else f"{path}#{seen[path]}"
        found.append(reader.op(node, name, path, kernel, macs))
    return tuple(found)


_MATMULS = ("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d")
_TRANSPOSED = ("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")


class _Reader:
    """Which space's units the dimensions of a graph's ops are."""

    def __init__(self, program: ExportedProgram, spaces: Spaces) -> None:
        names = program.graph_signature.inputs_to_parameters | program.graph_signature.inputs_to_buffers
        self._names = dict(names)
        self._cuts: dict[tuple[str, int], list[tuple[Space, NDArray[np.int32]]]] = {}
        for space in spaces.spaces:
            for cut in space.cuts:
                self._cuts.setdefault((cut.parameter, cut.dim), []).append((space, cut.owners))
        self._widths: dict[Node, Side | None] = {}
        timed = {node for node in user_inputs(program) if node.name != "timestep"}
        for node in program.graph.nodes:
            if any(one in timed for one in node.all_input_nodes):
                timed.add(node)
        self._timed = timed
        self._has_time = any(node.name == "timestep" for node in user_inputs(program))

    def op(self, node: Node, name: str, path: str, kernel: Kernel | None, macs: int) -> Op:
        kind, weight = op_name(node), 0
        if kind in (*_MATMULS, *_TRANSPOSED):
            held = node.args[1]
            assert isinstance(held, Node)
            size = tuple(held.meta["val"].shape)
            weight = math.prod(size)
            inner, outer = (0, 1) if kind in _TRANSPOSED else (1, 0)
            read, written = self._dimension(held, inner), self._dimension(held, outer)
            if kernel is not None and kernel.kind == "depthwise":
                read = written
        else:
            written = self._width(node) or (Piece(None, np.array([1.0])),)
            if kernel is not None and kernel.kind == "attention":
                written = tuple(piece.scaled(1.0 / kernel.sizes[2]) for piece in written)
            read = written
        folded = self._has_time and node not in self._timed
        return Op(name, path, kernel, read, written, macs, weight, folded)

    def _dimension(self, held: Node, dim: int) -> Side:
        """Of a weight."""
        size = int(held.meta["val"].shape[dim])
        pieces, rest = [], size
        for space, owners in self._cuts.get((self._names.get(held.name, ""), dim), ()):
            each = np.bincount(owners[owners >= 0], minlength=space.count).astype(np.float64)
            pieces.append(Piece(space.name, each))
            rest -= int(each.sum())
        return (*pieces, Piece(None, np.array([float(rest)]))) if rest > 0 or not pieces else tuple(pieces)

    def _width(self, node: Node) -> Side | None:
        """Of a value's channels: those of the product nearest before it."""
        if node not in self._widths:
            self._widths[node] = None  # a loop through a graph's inputs ends here
            self._widths[node] = self._found(node)
        return self._widths[node]

    def _found(self, node: Node) -> Side | None:
        if node.op != "call_function":
            return None
        kind = op_name(node)
        if kind in _MATMULS or kind in _TRANSPOSED:
            held = node.args[1]
            return self._dimension(held, 1 if kind in _TRANSPOSED else 0) if isinstance(held, Node) else None
        if kind == "aten.cat":
            sides = [self._width(one) for one in node.all_input_nodes]
            return tuple(piece for side in sides if side is not None for piece in side) or None
        if kind == "aten.chunk":
            side, parts = self._width(node.all_input_nodes[0]), node.args[1]
            assert isinstance(parts, int)
            return None if side is None else tuple(piece.scaled(1.0 / parts) for piece in side)
        if kind == "aten.scaled_dot_product_attention":
            return self._width(node.all_input_nodes[0])
        return next((side for side in map(self._width, node.all_input_nodes) if side is not None), None)


@dataclass(frozen=True)
class Priced:
    """The ways to compute an op, the float one first: name -> latency against the float's (for each backend), bits of
    a weight, and what it loses."""

    options: tuple[str, ...]
    time: Mapping[str, tuple[float, ...]]
    bits: tuple[int, ...]
    losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def plain(cls, backends: Sequence[str]) -> Priced:
        """fp32 and nothing else."""
        return cls(("fp32",), dict.fromkeys(backends, (1.0,)), (32,))


def work(
    component: str,
    op: Op,
    kept: Kept,
    surfaces: Mapping[str, Mapping[Kernel, Surface]],
    priced: Priced,
    calls: int,
) -> Work:
    """What `op` costs at every level of the spaces on its two sides: `macs`, `bytes`, `latency <backend>` in
    milliseconds of this machine, and MACs and latency of one call as `macs <component>` and so on. `calls`: how often
    a picture calls it. `surfaces`: backend -> of each kernel."""
    name = f"{component}/{op.name}"
    two_sided = op.kernel is None or op.kernel.two_sided
    reads = op.read if two_sided else (Piece(None, np.array([1.0])),)
    whole = max(1e-9, width(reads) * width(op.written))
    parts = []
    for read in reads:
        for written in op.written:
            r, w = read.sizes(kept)[:, None], written.sizes(kept)[None, :]
            product = r * w / whole
            costs = _shares(component, op.macs * product, calls, "macs")
            costs = {cost: np.repeat(table[None], len(priced.options), 0) for cost, table in costs.items()}
            bits = np.array(priced.bits, dtype=np.float64)[:, None, None]
            costs["bytes"] = bits / 8 * op.weight * product[None]
            for backend, known in surfaces.items():
                found = None if op.kernel is None or op.folded else known.get(op.kernel)
                if found is None:
                    continue
                of_time = np.array(priced.time[backend])[:, None, None]
                table = found.product * r * w + found.read * r / len(op.written) + found.written * w / len(reads)
                table = table + found.constant / (len(reads) * len(op.written))
                costs |= {
                    cost: of_time * one[None]
                    for cost, one in _shares(component, table, calls, f"latency {backend}").items()
                }
            parts.append(Part(_named(component, read, kept), _named(component, written, kept), costs))
    return Work(name, priced.options, tuple(parts), dict(priced.losses))


def _shares(component: str, table: Sizes, calls: int, name: str) -> dict[str, Sizes]:
    return {name: table * calls, f"{name} {component}": table}


def _named(component: str, piece: Piece, kept: Kept) -> str | None:
    return None if piece.space is None or piece.space not in kept else f"{component}/{piece.space}"


def ladders(component: str, spaces: Spaces, kept: Kept, losses: Mapping[str, Sequence[float]]) -> tuple[Ladder, ...]:
    """The spaces that have levels, with what each level loses, and the bytes of norms and biases, in fp32."""
    made = []
    for space in spaces.spaces:
        if space.name not in kept:
            continue
        vectors = [cut for cut in space.cuts if len(spaces.sizes.get(cut.parameter, (0, 0))) == 1]
        held = np.zeros(space.count)
        for cut in vectors:
            held += np.bincount(cut.owners[cut.owners >= 0], minlength=space.count)
        levels = kept[space.name]
        costs = {"bytes": tuple(4.0 * float(held[list(units)].sum()) for units in levels)}
        made.append(Ladder(f"{component}/{space.name}", len(levels), {"picture": tuple(losses[space.name])}, costs))
    return tuple(made)
