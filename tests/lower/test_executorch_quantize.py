"""What a plan says is what runs in an ExecuTorch program: counted in the file, executed, held against fake-quant."""

from types import SimpleNamespace

import pytest

from edgegen.errors import EdgegenError, UsageError
from edgegen.lower import executorch_quantize
from edgegen.lower.executorch import BACKEND
from edgegen.lower.executorch_quantize import (
    check,
    delegate_ops,
    misshapen,
    one_dequantize_a_reader,
    refuse_unrunnable,
    xnnpack_graphs,
)


def lower(every_op, ops, folder):
    from edgegen.precision.quantize import quantized

    program = quantized(every_op.program, ops)
    result = BACKEND.lower(program, every_op.request(folder, ops))
    return SimpleNamespace(ops=ops, program=program, result=result, path=folder / result.file)


@pytest.fixture(scope="session")
def int8(every_op, tmp_path_factory):
    """All convolutions and linears w8a8 but one linear, which is dynamic; the matmul is float."""
    ops = {name: op for name, op in every_op.plan("w8a8", {"projection": "w8a8-dynamic"}).items() if op.op != "matmul"}
    return lower(every_op, ops, tmp_path_factory.mktemp("executorch_int8"))


def test_every_planned_op_runs_in_int8(int8):
    found = delegate_ops(int8.path.read_bytes())
    assert found.static == {"XNNConv2d": 7, "XNNDepthwiseConv2d": 1, "XNNConvTranspose2d": 1, "XNNFullyConnected": 2}
    assert found.dynamic == {"XNNFullyConnected": 1} and not found.floating
    assert (
        int8.result.details["int8_ops"]
        == "7 XNNConv2d, 1 XNNConvTranspose2d, 1 XNNDepthwiseConv2d, 3 XNNFullyConnected"
    )
    assert int8.result.details["compressed_weights"] == "11 w8a8, 1 w8a8-dynamic"
    assert int8.result.delegation.pieces == 1


def test_it_computes_what_fake_quant_computes(every_op, int8):
    """A few values lie halfway between two codes and go the other way: nothing more."""
    for place, db in every_op.parity(BACKEND, int8.path, int8.program).items():
        assert db > 45, (place, db)


def test_int8_is_not_float_in_disguise(every_op, int8):
    for place, db in every_op.parity(BACKEND, int8.path, every_op.program).items():
        assert place == 7 or db < 55, (place, db)  # 7: the matmul, which is float


def test_shared_dequantized_values_are_what_executorch_gets_wrong(every_op, int8, tmp_path, monkeypatch):
    """Its layout pass fails on the graph as it is: on other graphs it goes through and layouts do not fit."""
    monkeypatch.setattr("edgegen.lower.executorch.one_dequantize_a_reader", lambda program: program)
    with pytest.raises(EdgegenError, match="ChannelsLastTaggedReshapePass"):
        lower(every_op, int8.ops, tmp_path)


def test_layouts_that_do_not_fit_are_found_in_the_file(int8, monkeypatch):
    graphs = list(xnnpack_graphs(int8.path.read_bytes()))
    assert not any(misshapen(graph) for graph in graphs)
    (subtract,) = (node["xnode_union"] for node in graphs[0]["xnodes"] if node["xnode_union_type"] == "XNNSubtract")
    values = [value["xvalue_union"] for value in graphs[0]["xvalues"]]
    turned = next(v for v in values if v.get("tensor_value", v)["id_out"] == subtract["input1_id"])
    turned.get("tensor_value", turned)["dims"] = [1, 12, 10, 10]
    assert misshapen(graphs[0]) == ["XNNSubtract of [1, 12, 10, 10] and [1, 1, 1, 12] giving [1, 10, 10, 12]"]
    monkeypatch.setattr(executorch_quantize, "xnnpack_graphs", lambda content: iter(graphs))
    with pytest.raises(EdgegenError, match="do not fit their values"):
        delegate_ops(int8.path.read_bytes())


def test_each_reader_gets_a_dequantize_and_numbers_stay(every_op, int8):
    import torch

    from edgegen.graph.evaluate import evaluate

    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    made = one_dequantize_a_reader(int8.program)
    before, after = ([n for n in p.graph.nodes if n.target is dequantize] for p in (int8.program, made))
    assert any(len(node.users) > 1 for node in before) and all(len(node.users) == 1 for node in after)
    assert one_dequantize_a_reader(made) is made
    expected, found = (evaluate(program, every_op.inputs) for program in (int8.program, made))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_an_op_that_stays_float_is_found_out(every_op, int8, tmp_path):
    """The plan says one op more than the graph that was lowered."""
    name = next(name for name, op in int8.ops.items() if op.op == "conv")
    fewer = {key: op for key, op in int8.ops.items() if key != name}
    made = lower(every_op, fewer, tmp_path)
    empty = every_op.program
    assert check(made.path.read_bytes(), empty, fewer).static.total() == 10
    with pytest.raises(EdgegenError, match="1 of 11 ops that are planned as w8a8 run in float"):
        check(made.path.read_bytes(), empty, int8.ops)


def test_another_op_in_its_place_does_not_count(every_op, tmp_path):
    """As many ops as planned run in int8, and one of them is not the planned one: its weight says so."""
    first, second = [name for name, op in every_op.plan("w8a8").items() if op.op == "conv"][:2]
    whole = {name: op for name, op in every_op.plan("w8a8").items() if op.op != "matmul"}
    there, asked = ({name: op for name, op in whole.items() if name != left} for left in (first, second))
    made = lower(every_op, there, tmp_path)
    content, empty = made.path.read_bytes(), every_op.program
    from edgegen.lower.stored_weight import stored_weights
    from edgegen.precision.quantize import quantized

    assert check(content, empty, there, stored_weights(made.program, there)).static.total() == 11
    stored = stored_weights(quantized(every_op.program, asked), asked)
    check(content, empty, asked)  # counted alone nothing is missing
    with pytest.raises(EdgegenError, match=f"`{first}` is planned as w8a8, and its weight is not in a delegate"):
        check(content, empty, asked, stored)
    dynamic = {name: op.model_copy(update={"precision": "w8a8-dynamic"}) for name, op in there.items()}
    with pytest.raises(EdgegenError, match="is read by an op in w8a8"):
        check(content, empty, dynamic, stored_weights(made.program, there))


def test_float_compute_between_dequantize_and_quantize_is_named(int8):
    """The graph before any partition: all of it is outside of delegates."""
    named = executorch_quantize.outside(int8.program)
    assert len(named) == len(int8.ops) and any("`stem`" in one for one in named)


@pytest.mark.parametrize("precision", ["w8", "w4", "w6"])
def test_compressed_weights_of_float_arithmetic_are_refused(every_op, precision):
    ops = every_op.plan(precision, form="palette" if precision == "w6" else "affine")
    with pytest.raises(UsageError, match=f"cannot be {precision} in ExecuTorch.*unpacks weights") as caught:
        refuse_unrunnable(every_op.program, ops, "fp32")
    assert "`fp32`" in caught.value.hint


def test_what_xnnpack_lacks_in_int8_is_refused(every_op):
    static = every_op.plan("w8a8")
    product = {name: op for name, op in static.items() if op.op == "matmul"}
    with pytest.raises(UsageError, match="computed matrices"):
        refuse_unrunnable(every_op.program, product, "fp32")
    with pytest.raises(UsageError, match="dynamic convolutions"):
        refuse_unrunnable(every_op.program, every_op.plan("w8a8-dynamic"), "fp32")
    with pytest.raises(EdgegenError, match="`nowhere`, which is no call"):
        refuse_unrunnable(every_op.program, {"nowhere": next(iter(static.values()))}, "fp32")


def test_int8_beside_float16_is_refused(every_op, tmp_path):
    """It lowers, runs and gives noise."""
    ops = {name: op for name, op in every_op.plan("w8a8").items() if op.op == "conv"}
    with pytest.raises(UsageError, match="beside float16") as caught:
        BACKEND.lower(every_op.program, every_op.request(tmp_path, ops, "fp16"))
    assert "float_precision" in caught.value.hint
