"""What other libraries say while they are imported is not what a command says."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "statement", ["from diffusers import UNet2DConditionModel", "from coremltools.proto import Model_pb2"]
)
def test_imports_are_silent(statement):
    pytest.importorskip(statement.split()[1].split(".")[0])
    code = f"from edgegen.cli.console import hush_imports; hush_imports(); {statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
