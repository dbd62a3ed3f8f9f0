"""Plans and repairs are tested on small students and on the shipped one."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, so their neighbours have to be findable


@pytest.fixture(scope="session")
def shapes_programs(shapes):
    """Component of the shipped student -> the graph that plans are made on."""
    from edgegen.precision.canonical import canonical_programs

    return canonical_programs(shapes)


@pytest.fixture(scope="session")
def tiny_programs(tiny):
    """Component of the tiny student -> the graph that plans are made on."""
    from edgegen.precision.canonical import canonical_programs

    return canonical_programs(tiny)
