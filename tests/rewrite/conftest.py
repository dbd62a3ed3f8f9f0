"""The one helper that every pass test goes through."""

import copy

import pytest
import torch

from edgegen.graph.edit import made_by, user_inputs
from edgegen.graph.evaluate import evaluate
from edgegen.rewrite.base import census
from edgegen.rewrite.registry import parse


def export(module, *inputs):
    """The graph of a module, as capture gives it."""
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs)


def relative_error(expected, found):
    """max |a - b| / max |a|; 0 for equal tensors, inf where only one of them is finite."""
    assert expected.shape == found.shape and expected.dtype == found.dtype
    if torch.equal(expected, found):
        return 0.0
    if not torch.isfinite(expected).all() or not torch.isfinite(found).all():
        return float("inf")
    a, b = expected.double(), found.double()
    return ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()


@pytest.fixture(name="relative_error")
def _relative_error():
    return relative_error


@pytest.fixture
def check_pass():
    """check(pass, module or program, *inputs, modified=, before=, after=, renamed=) -> (program, declines).

    Holds: census of ops before (`before`: op -> count, those named only), the graph given stays as it was, lint, shapes
    propagated again and equal, signature unchanged unless the pass says so, numbers within the pass's own stated
    tolerance, `modified` honest, a second run changes nothing, provenance on every new node, text form reads back as
    the same value, census after (`after`; count 0 for ops that must be gone). `renamed` gives the new inputs of a pass
    that changes the signature: name -> tensor.
    """

    def check(one, source, *inputs, modified=True, before=None, after=None, renamed=None, tolerance=None):
        program = source if isinstance(source, torch.export.ExportedProgram) else export(source, *inputs)
        names = [node.name for node in user_inputs(program)]
        given = dict(zip(names, inputs, strict=True))
        for op, count in (before or {}).items():
            assert census(program)[op] == count, f"before: {op} {census(program)[op]}, expected {count}"
        text = str(program.graph)
        expected = evaluate(program, {k: copy.deepcopy(v) for k, v in given.items()})

        result = one(program)

        assert str(program.graph) == text, "the graph that was given has changed"
        assert result.modified is modified, f"modified is {result.modified}; declined: {result.declined}"
        assert parse(str(one)) == (one,)
        if not modified:
            assert result.program is program
            return result
        rewritten = result.program
        rewritten.graph.lint()
        new_names = [node.name for node in user_inputs(rewritten)]
        assert one.changes_signature or new_names == names
        now = {**given, **(renamed or {})}
        assert set(new_names) <= set(now), f"inputs are now {new_names}"

        def watch(node, value):
            values = value if isinstance(value, tuple | list) else [value]
            metas = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
            for real, fake in zip(values, metas, strict=True):
                if isinstance(real, torch.Tensor):
                    assert real.shape == fake.shape, f"{node.name}: {tuple(real.shape)}, said {tuple(fake.shape)}"
                    assert real.dtype == fake.dtype, f"{node.name}: {real.dtype}, said {fake.dtype}"

        found = evaluate(rewritten, now, watch)
        limit = one.tolerance if tolerance is None else tolerance
        for a, b in zip(expected, found, strict=True):
            error = relative_error(a, b)
            assert error <= limit, f"relative error {error:.3g} > {limit:.3g}"
        called = rewritten.module()(*[now[name] for name in new_names])
        for a, b in zip(found, called if isinstance(called, tuple | list) else (called,), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        known = {(node.name, node.target) for node in program.graph.nodes}
        for node in rewritten.graph.nodes:
            if node.op == "call_function" and (node.name, node.target) not in known:
                assert one.name in made_by(node), f"{node.name} does not say which pass made it"
        assert not one(rewritten).modified, "a second run changes the graph again"
        for op, count in (after or {}).items():
            assert census(rewritten)[op] == count, f"after: {op} {census(rewritten)[op]}, expected {count}"
        return result

    return check
