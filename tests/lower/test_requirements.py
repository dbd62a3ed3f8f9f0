"""Missing libraries are told before work starts, with a command that installs them."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from edgegen.errors import UsageError
from edgegen.lower.backend import BACKENDS, get_backend
from edgegen.lower.requirements import missing_modules, require


def backend(lower=("json",), run=("json",)):
    return SimpleNamespace(name="thing", extra="thing", lower_modules=lower, run_modules=run)


def test_nothing_is_missing_when_everything_is_there():
    require(backend(), "lower")
    require(backend(), "run")
    assert missing_modules(backend(), "lower") == ()


@pytest.mark.parametrize(("half", "verb"), [("lower", "lower"), ("run", "run")])
def test_missing_module_is_named_with_the_command_that_brings_it(half, verb):
    broken = backend(**{half: ("json", "no_such_module_here")})
    with pytest.raises(UsageError) as caught:
        require(broken, half)
    assert f"backend `thing` cannot {verb}: `no_such_module_here` is not installed" == caught.value.message
    assert caught.value.hint == "pip install 'edgegen[thing]'"
    assert caught.value.exit_code == 2
    require(broken, "run" if half == "lower" else "lower")  # the other half does not care


def test_several_missing_modules_and_a_dotted_one():
    with pytest.raises(UsageError, match=r"`no_such_a`, `no_such_b\.part` are not installed"):
        require(backend(lower=("no_such_a", "no_such_b.part")), "lower")


@pytest.mark.parametrize("name", BACKENDS)
def test_real_backends_are_installed_here_and_their_extra_exists(name):
    found = get_backend(name)
    assert missing_modules(found, "lower") == missing_modules(found, "run") == ()
    from importlib.metadata import metadata

    assert found.extra in metadata("edgegen").get_all("Provides-Extra")


def test_asking_imports_no_heavy_library():
    code = (
        "import sys\n"
        "from edgegen.lower.backend import BACKENDS, get_backend\n"
        "from edgegen.lower.requirements import require\n"
        "for name in BACKENDS:\n"
        "    require(get_backend(name), 'lower'); require(get_backend(name), 'run')\n"
        "heavy = {'torch', 'coremltools', 'coreai', 'coreai_torch', 'onnx', 'onnxruntime', 'executorch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
