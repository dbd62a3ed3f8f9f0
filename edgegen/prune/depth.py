"""Blocks that a few-step student can do without: found on its graph, ranked by what they do to the picture.

A block can be passed by where what is left is still the network: a residual block gives its input, a branch that is
added gives zeros. To first order, passing one by moves its output by an error that is known (what the block added), and
the gradient of random functionals of the picture says what that error does to it: the estimate of `effects`. SnapFusion
(arXiv 2306.00980) ranks blocks by change of quality per change of latency, TinySR by how much a block changes what
passes through it, PPCL by how well a linear map does the same, and by where the similarity to what a chain of blocks
began with stops falling: runs of such blocks go together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.count import macs_of, op_name
from edgegen.graph.edit import weights
from edgegen.precision.pictures import PEAK_SQUARED
from edgegen.prune.trial import Trial
from edgegen.students.pruning import Way
from edgegen.students.student import Component, Student

PROBES = 6
ROWS = 512
"""Tokens or places of one call that similarities and probes are computed on."""
RIDGE = 1e-3


@dataclass(frozen=True)
class Block:
    """A module that may be passed by. `after`: the block whose output it reads, where nothing lies between."""

    component: str
    path: str
    way: Way
    macs: int
    parameters: int
    after: str | None = None

    @property
    def name(self) -> str:
        return f"{self.component}/{self.path}"


def blocks(component: Component, program: ExportedProgram) -> tuple[Block, ...]:
    """Those of one component, in the order in which they run; `program` is its captured graph."""
    regions = _regions(program)
    modules = dict(component.module.named_modules())
    held = set(weights(program))
    found: list[tuple[Block, Node, Node]] = []
    for path, region in regions.items():
        module = modules.get(path)
        if module is None or not any(True for _ in module.children()):
            continue
        macs = sum(macs_of(node) for node in region)
        way = _way(region, held) if macs else None
        if way is not None:
            parameters = sum(one.numel() for one in module.parameters())
            block = Block(component.name, path, way[0], macs, parameters)
            found.append((block, way[1], way[2]))
    kept = [one for one in found if not any(_covers(other, one) for other in found)]
    by_output = {output: block for block, _, output in kept if block.way == "identity"}
    made = []
    for block, source, _ in kept:
        before = by_output.get(source)
        chained = block.way == "identity" and before is not None
        made.append(Block(**{**vars(block), "after": before.path}) if chained and before is not None else block)
    return tuple(made)


def _regions(program: ExportedProgram) -> dict[str, list[Node]]:
    """Module path -> the calls within it, of modules that are called once; in the order of the graph."""
    found: dict[str, list[Node]] = {}
    again = set()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            name = str(path).removeprefix("L['self'].").removeprefix("L__self__.")
            if "@" in name:
                again.add(".".join(part.split("@")[0] for part in name.split(".")))
            elif name and name not in ("L['self']", "L__self__"):
                found.setdefault(name, []).append(node)
    return {path: region for path, region in found.items() if path not in again}


_SUMS = ("aten.add",)
_AFTER_A_SUM = ("aten.relu", "aten.div")
"""What may follow the addition within a residual block."""


def _way(region: Sequence[Node], held: set[str]) -> tuple[Way, Node, Node] | None:
    """How a region can be passed by, what it reads first, and its output; None where it cannot."""
    inside = set(region)
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    reads = [one for node in region for one in node.all_input_nodes if one not in inside and one.name not in held]
    if len(outputs) != 1 or not reads:
        return None
    (output,) = outputs
    shape = _shape(output)
    alike = [one for one in reads if _shape(one) == shape]
    if not alike:
        return None
    at = output
    while op_name(at) in _AFTER_A_SUM and at.all_input_nodes and at.all_input_nodes[0] in inside:
        at = at.all_input_nodes[0]
    for node in _stream(at, inside):
        for one in node.all_input_nodes:
            if one in alike:
                return "identity", one, output
    sums = [user for user in output.users if user not in inside]
    if all(op_name(user) in _SUMS and _shape(user) == shape for user in sums):
        return "zero", alike[0], output
    return None


def _stream(node: Node, inside: set[Node]) -> Iterator[Node]:
    """The additions that a residual block's output goes back through, one after another."""
    todo = [node]
    while todo:
        at = todo.pop()
        if op_name(at) in _SUMS:
            yield at
            todo += [one for one in at.all_input_nodes if one in inside and op_name(one) in _SUMS]


def _covers(one: tuple[Block, Node, Node], other: tuple[Block, Node, Node]) -> bool:
    """Whether passing `one` by does all that passing `other` by does, and saves as much or more: `other` is a part of
    it, and either all of its MACs or the end of the same branch."""
    if not other[0].path.startswith(f"{one[0].path}."):
        return False
    return one[0].macs == other[0].macs or (one[0].way == other[0].way == "zero" and one[2] is other[2])


def _shape(node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


@contextmanager
def passed_by(student: Student, removed: Sequence[Block]) -> Iterator[Student]:
    """`student` with blocks passed by, as long as this is open: nothing is copied."""
    with ExitStack() as stack:
        for block in removed:
            module = student.components[block.component].module.get_submodule(block.path)
            stack.callback(module.register_forward_hook(_HOOKS[block.way]).remove)
        yield student


def _give_input(module: nn.Module, given: tuple[Any, ...], made: Any) -> Any:
    return given[0]


def _give_zeros(module: nn.Module, given: tuple[Any, ...], made: Any) -> Any:
    return torch.zeros_like(made)


_HOOKS: dict[Way, Callable[[nn.Module, tuple[Any, ...], Any], Any]] = {"identity": _give_input, "zero": _give_zeros}


def measured(trial: Trial, removed: Sequence[Block]) -> float:
    """What passing all of these by does to the picture."""
    expected = trial.pictures
    with passed_by(trial.student, removed) as student:
        found = trial.drawn(student)
    return float((found - expected).double().square().mean()) / PEAK_SQUARED


@dataclass(frozen=True)
class Effect:
    """What a block does. `picture`: the expected loss when it is passed by, to first order. `change`: how much it
    changes what passes through it, the square of what it adds over that of what it reads. `probe`: the share of its
    output that no linear map of its input gives. `similarity`: of its output with what its chain began with (linear
    CKA, arXiv 1905.00414)."""

    picture: float
    change: float
    probe: float
    similarity: float


def effects(trial: Trial, found: Sequence[Block], probes: int = PROBES) -> dict[str, Effect]:
    """Block -> its effect, from one drawing of the trial's pictures and `probes` backward passes through it."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {block.name: [] for block in found}
    sums = dict.fromkeys(seen, 0.0)
    generator = torch.Generator().manual_seed(0)
    for one in trial.parts():
        squares, passed = _squares(one, found, probes, generator)
        for name in seen:
            sums[name] += squares[name] / len(trial.seeds)
            seen[name] += passed[name]
    by_path = {(block.component, block.path): block for block in found}
    return {block.name: _effect(block, sums[block.name], seen, by_path) for block in found}


def _squares(
    trial: Trial, found: Sequence[Block], probes: int, generator: torch.Generator
) -> tuple[dict[str, float], dict[str, list[tuple[Tensor, Tensor]]]]:
    """Block -> the expected losses of the pictures of `trial`, summed, and what its block read and made."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {block.name: [] for block in found}
    with ExitStack() as stack, torch.enable_grad():
        for block in found:
            module = trial.student.components[block.component].module.get_submodule(block.path)
            stack.callback(module.register_forward_hook(_recorder(seen[block.name])).remove)
        pictures = trial.draw(trial.student, lambda x: x.requires_grad_())
    outputs = [(block, given, made) for block in found for given, made in seen[block.name]]
    reached = [one for one in outputs if one[2].requires_grad]
    count = len(trial.seeds)
    sums = dict.fromkeys(seen, 0.0)
    scale = (PEAK_SQUARED * pictures.numel() / count) ** -0.5
    for index in range(probes):
        signs = torch.randint(0, 2, pictures.shape, generator=generator).to(pictures) * 2 - 1
        leaves = [made for _, _, made in reached]
        gradients = torch.autograd.grad(
            pictures, leaves, signs * scale, retain_graph=index + 1 < probes, allow_unused=True
        )
        dots = {block.name: torch.zeros(count, dtype=torch.float64) for block in found}
        for (block, given, made), gradient in zip(reached, gradients, strict=True):
            if gradient is not None:
                error = given - made if block.way == "identity" else -made
                # Of one picture the first axis may be its frames.
                dots[block.name] += (gradient * error.detach()).reshape(count, -1).double().sum(1)
        for name, dot in dots.items():
            sums[name] += float(dot.square().sum()) / probes
    return sums, {name: [(given, made.detach()) for given, made in passed] for name, passed in seen.items()}


def _recorder(kept: list[tuple[Tensor, Tensor]]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def record(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        kept.append((given[0].detach(), made))

    return record


def _effect(
    block: Block,
    picture: float,
    seen: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    by_path: Mapping[tuple[str, str], Block],
) -> Effect:
    first = block
    while first.after is not None:
        first = by_path[block.component, first.after]
    changes, left, alike = [], [], []
    for (given, made), (start, _) in zip(seen[block.name], seen[first.name], strict=True):
        x, y = _rows(given), _rows(made.detach())
        added = y - x if block.way == "identity" else y
        changes.append(float(added.square().sum() / x.square().sum().clamp_min(1e-30)))
        left.append(_unexplained(x, y))
        alike.append(similarity(_rows(start), y))
    count = max(1, len(changes))
    return Effect(picture, sum(changes) / count, sum(left) / count, sum(alike) / count)


def _rows(value: Tensor) -> Tensor:
    """[places, channels] in float64, at most `ROWS` of them, evenly: channels are the second axis of pictures, the last
    of tokens."""
    flat = value.flatten(2).transpose(1, 2) if value.dim() >= 4 else value
    rows = flat.reshape(-1, flat.shape[-1])
    return rows[:: max(1, len(rows) // ROWS)].double()


def _unexplained(x: Tensor, y: Tensor) -> float:
    """1 - R^2 of the best linear map from x to y (ridge)."""
    a, b = x - x.mean(0), y - y.mean(0)
    gram = a.T @ a
    gram += RIDGE * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    rest = b - a @ torch.linalg.solve(gram, a.T @ b)
    return float(rest.square().sum() / b.square().sum().clamp_min(1e-30))


def similarity(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of rows, 0..1: 1 where they are the same but for a rotation and a scale."""
    a, b = x - x.mean(0), y - y.mean(0)
    across = (a.T @ b).square().sum()
    own = (a.T @ a).square().sum().sqrt() * (b.T @ b).square().sum().sqrt()
    return float(across / own.clamp_min(1e-30))


def chains(found: Sequence[Block]) -> list[list[Block]]:
    """Blocks that read one another's output, two or more in a row."""
    following = {(block.component, block.after): block for block in found if block.after is not None}
    made = []
    for block in found:
        if block.after is None and block.way == "identity":
            chain = [block]
            while (block.component, chain[-1].path) in following:
                chain.append(following[block.component, chain[-1].path])
            if len(chain) > 1:
                made.append(chain)
    return made


def runs(found: Sequence[Block], known: Mapping[str, Effect], most: int = 4) -> list[tuple[Block, ...]]:
    """Contiguous blocks that may go together: of each chain, from every block on, as long as the similarity to the
    chain's beginning falls no faster than it does on average over the chain (PPCL's first difference)."""
    made: list[tuple[Block, ...]] = []
    for chain in chains(found):
        levels = [1.0, *(known[block.name].similarity for block in chain)]
        falls = [before - after for before, after in itertools.pairwise(levels)]
        middle = sum(falls) / len(falls)
        for start in range(len(chain)):
            end = start
            while end < len(chain) and end - start < most and falls[end] <= middle + 1e-9:
                end += 1
                if end - start > 1:
                    made.append(tuple(chain[start:end]))
    return made
