"""What comes before a plan: passes that change what is weighed or given, whoever lowers the graph."""

import pytest

from edgegen.precision.canonical import canonical_passes


def names(*backends):
    return [one.name for one in canonical_passes("decoder", (), backends).passes]


@pytest.mark.parametrize("backends", [(), ("coreml",), ("coreml", "coreai"), ("onnx",), ("coreml", "tflite")])
def test_phases_of_upsamplings_are_for_all_where_one_runtime_wants_them(backends):
    found = names(*backends)
    assert found[:-1] == names() or found == names()
    assert ("upsample-to-pixel-shuffle" in found) == bool({"onnx", "tflite", "executorch"}.intersection(backends))
    assert "fold-attention-scale" in found and len(set(found)) == len(found)
