"""A conversion that this machine has no memory for is refused with both figures, and with what would fit."""

import pytest

from edgegen.build.room import Conversion, require_room
from edgegen.errors import EdgegenError

GIB = 2**30


def wanted(*backends, parts=1):
    return {name: (Conversion(name, "denoiser", int(9.6 * GIB), parts),) for name in backends}


def test_what_fits_says_nothing():
    require_room(wanted("onnx", "coreml"), 20 * GIB)
    require_room(wanted("tflite"), None)


def test_what_does_not_fit_is_refused_with_what_does():
    with pytest.raises(EdgegenError) as caught:
        require_room(wanted("onnx", "coreml", "tflite"), 20 * GIB)
    assert "`denoiser` has 9.6 GiB" in caught.value.message and "20.0 GiB are free" in caught.value.message
    assert "tflite" in caught.value.message
    assert "`--backend onnx,coreml`" in caught.value.hint


def test_parts_need_less_at_once():
    require_room(wanted("tflite", parts=6), 20 * GIB)


def test_where_nothing_fits_only_a_larger_machine_helps():
    with pytest.raises(EdgegenError) as caught:
        require_room(wanted("tflite"), 2 * GIB)
    assert "--backend" not in caught.value.hint and "GiB free" in caught.value.hint
