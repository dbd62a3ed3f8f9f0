"""Kernels timed on a real runtime, and times that are remembered."""

import pytest

from edgegen.cache import Cache
from edgegen.cli.console import Output
from edgegen.prune.bench import Point, times
from edgegen.prune.kernels import Kernel


def test_a_wider_kernel_takes_longer_and_is_timed_once(tmp_path):
    conv = Kernel(kind="conv", sizes=(3, 3, 1, 32, 32))
    wide, narrow = (Point(kernel=conv, read=width, written=width) for width in (128, 16))
    cache = Cache(tmp_path)
    with Output(quiet=True).progress() as progress:
        first = times("onnx", [wide, narrow], cache, progress)
        again = times("onnx", [wide, narrow], cache, progress)
    assert first == again
    assert first[wide] > 4 * first[narrow]  # 64 times the work
    macs = 9 * 32 * 32 * 128 * 128
    assert 1e9 < macs / (first[wide] / 1e3) < 1e13  # MACs a second
    assert cache.statistics.built == 2


@pytest.mark.parametrize(
    "kind, sizes", [("group_norm", (64, 4)), ("attention", (16, 16, 8)), ("depthwise", (3, 3, 1, 8, 8))]
)
def test_every_kind_of_network_runs(kind, sizes):
    import torch

    from edgegen.prune.kernels import network

    module, shape = network(Kernel(kind=kind, sizes=sizes), 8, 8)
    assert module(torch.zeros(shape)).shape == shape
