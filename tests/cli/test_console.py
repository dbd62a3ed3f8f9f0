"""What a command says on stderr, and what it does not."""

import logging
import subprocess
import sys

import click
import pytest

from edgegen.cli.console import reporting


@pytest.mark.parametrize(
    "statement", ["from diffusers import UNet2DConditionModel", "from coremltools.proto import Model_pb2"]
)
def test_imports_are_silent(statement):
    pytest.importorskip(statement.split()[1].split(".")[0])
    code = f"from edgegen.cli.console import hush_imports; hush_imports(); {statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("options", "said"), [([], ["a folder's own adapter", "broken"]), (["-q"], ["broken"])])
def test_quiet_leaves_errors_alone(options, said, caplog):
    @click.command()
    @reporting
    def command(output):
        logging.getLogger("edgegen.students").warning("a folder's own adapter")
        logging.getLogger("edgegen.students").error("broken")

    command.main(options, standalone_mode=False)
    assert caplog.messages == said
    assert logging.getLogger("edgegen").level == logging.NOTSET
