"""States: what a program keeps between calls."""

import numpy as np
import pytest

from mlprogram import Program, ProgramError

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def counter(packages):
    """The state is read as `before`, then twice increased by `x` and read again, as `after` and as `late`."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    @mb.program(
        input_specs=[mb.TensorSpec((2, 3)), mb.StateTensorSpec((2, 3), dtype=types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x, kept):
        before = mb.read_state(input=kept)
        half = mb.cast(x=x, dtype="fp16")
        after = mb.coreml_update_state(state=kept, value=mb.add(x=before, y=half))
        late = mb.coreml_update_state(state=kept, value=mb.add(x=after, y=half))
        return (
            mb.cast(x=before, dtype="fp32", name="before"),
            mb.cast(x=after, dtype="fp32", name="after"),
            mb.cast(x=late, dtype="fp32", name="late"),
        )

    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = packages.path()
    model.save(str(path))
    return path


def test_a_state_begins_as_zeros_and_is_kept(counter):
    program = Program.open(counter)
    assert [(one.name, one.shape, one.dtype.name) for one in program.states] == [("kept", (2, 3), "float16")]
    assert [one.name for one in program.inputs] == ["x"]
    assert {"read_state", "write_state"} <= {one.type for one in program.operations}
    state = program.make_state()
    for call in range(3):
        found = program({"x": X}, state=state)
        # A value that was read before a write stays what it was.
        for name, times in (("before", 2 * call), ("after", 2 * call + 1), ("late", 2 * call + 2)):
            np.testing.assert_array_equal(found[name], times * X)
        np.testing.assert_array_equal(state.read("kept"), (2 * call + 2) * X.astype(np.float16))


def test_a_state_can_be_read_and_written(counter):
    program = Program.open(counter)
    state = program.make_state()
    state.write("kept", np.full((2, 3), 10, np.float16))
    state.read("kept")[:] = 99
    np.testing.assert_array_equal(program({"x": X}, state=state)["before"], np.full((2, 3), 10, np.float32))
    for call, message in (
        (lambda: state.read("lost"), "no state `lost`"),
        (lambda: state.write("kept", np.zeros((2, 3), np.float32)), "not float32"),
        (lambda: state.write("kept", np.zeros((3, 2), np.float16)), r"\[3, 2\]"),
    ):
        with pytest.raises(ProgramError, match=message):
            call()


def test_a_call_that_fails_leaves_the_state(counter):
    program = Program.open(counter)
    state = program.make_state()
    program({"x": X}, state=state)
    kept = state.read("kept")

    def stop(operation, values):
        if any(name == "late" for name, _ in operation.outputs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program({"x": X}, stop, state=state)
    np.testing.assert_array_equal(state.read("kept"), kept)


def test_states_are_given_to_whom_they_belong(packages, counter):
    program = Program.open(counter)
    with pytest.raises(ProgramError, match="was given no state") as caught:
        program({"x": X})
    assert "make_state" in caught.value.hint
    other = Program.open(
        packages.operations(lambda mb, holders: {"y": mb.add(x=holders["x"], y=np.float32(1))}, {"x": X})
    )
    assert other.states == ()
    with pytest.raises(ProgramError, match="another program's"):
        other({"x": X}, state=program.make_state())


def test_fp32_arithmetic_keeps_a_state_in_fp32(counter):
    program = Program.open(counter, arithmetic="fp32")
    state = program.make_state()
    third = np.full((2, 3), 1 / 3, np.float32)
    np.testing.assert_allclose(program({"x": third}, state=state)["late"], 2 / 3, rtol=1e-7)
