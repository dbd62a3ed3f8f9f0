"""The planner's own interpreter gives what torch's does."""

import torch
from torch.fx import Interpreter

from edgegen.graph.edit import user_inputs, weights
from edgegen.precision.interpret import Steps


def test_it_computes_each_call_once_and_what_torch_does(tiny_programs):
    program = tiny_programs["denoiser"]
    held = {name: value.detach() for name, value in weights(program).items()}
    torch.manual_seed(0)
    for node in user_inputs(program):
        kind = node.meta["val"]
        held[node.name] = (
            torch.randn(kind.shape) if kind.is_floating_point() else torch.zeros(kind.shape, dtype=kind.dtype)
        )
    given = [held[node.name] for node in program.graph.nodes if node.op == "placeholder"]
    called = []

    def compute(node, args, kwargs):
        called.append(node.name)
        return node.target(*args, **kwargs)

    with torch.no_grad():
        expected = Interpreter(program.graph_module).run(*given, enable_io_processing=False)
        steps = Steps(program)
        for _ in range(2):  # nothing of the first run is left in the second
            called.clear()
            found = steps.run(given, compute)
            assert called == [node.name for node in program.graph.nodes if node.op == "call_function"]
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class Shared(torch.nn.Module):
    """A value that is read twice, one inside a list, one as a keyword, and one that nobody reads."""

    def forward(self, x):
        y = x.relu()
        unread = y + 1
        del unread
        return torch.cat([y, x, y], dim=0), torch.nn.functional.gelu(y, approximate="tanh")


def test_lists_keywords_and_values_read_again():
    program = torch.export.export(Shared(), (torch.randn(2, 3),))
    x = torch.randn(2, 3)
    found = Steps(program).run([x], lambda node, args, kwargs: node.target(*args, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(Shared()(x), found, strict=True))
