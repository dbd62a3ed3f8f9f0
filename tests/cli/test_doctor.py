import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from edgegen import doctor
from edgegen.cli.main import main

ROOT = Path(__file__).parents[2]


def test_reports_this_environment(capsys):
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["core"]["state"] in ("ok", "differs")
    assert data["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [part["name"] for part in data["extras"]] == list(doctor.ENABLES)
    torch = next(package for package in data["core"]["packages"] if package["name"] == "torch")
    assert torch["tested"] == "2.13.0"
    assert torch["installed"].startswith("2.")


def test_every_extra_is_explained_and_every_dependency_is_in_the_tested_set():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.ENABLES) == set(project["optional-dependencies"]) - {"all"}
    tested = doctor.tested_versions()
    for requirement in doctor.requirements():
        assert requirement.name in tested, requirement
        assert doctor.satisfies(tested[requirement.name], requirement.specifier), requirement


def test_constraints_name_versions_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals, line
            assert not set("/@+: ") & set(name + version), line
    assert doctor.tested_versions()["torch"] == "2.13.0"
    assert "edgegen" not in doctor.tested_versions()


def test_the_wheel_carries_targets_and_constraints():
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert included["force-include"]["targets"] == "edgegen/_data/targets"
    assert included["force-include"]["constraints.txt"] == "edgegen/_data/constraints.txt"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as the wheel lays it out, beside a pyproject.toml and a constraints.txt of somebody else."""
    site = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(ROOT / "edgegen", site / "edgegen", ignore=shutil.ignore_patterns("__pycache__", "weights"))
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, place in wheel["force-include"].items():
        (site / place).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
        copy(ROOT / source, site / place)
    (site / "pyproject.toml").write_text('[project]\nname = "stray"\ndependencies = ["nothing"]\n')
    (site / "constraints.txt").write_text("torch==0.1\n")
    (site / "targets").mkdir()
    return site


def test_an_installed_wheel_finds_its_targets_and_its_tested_set(installed, tmp_path):
    def run(*args):
        argv = [sys.executable, "-P", "-m", "edgegen.cli.main", *args]
        return subprocess.run(
            argv, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}
        )

    listed = run("targets", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert len(json.loads(listed.stdout)) >= 16
    examined = run("doctor", "--json")
    assert examined.returncode == 0, examined.stderr
    torch = next(p for p in json.loads(examined.stdout)["core"]["packages"] if p["name"] == "torch")
    assert torch["tested"] == "2.13.0"


@pytest.fixture
def pretend(monkeypatch):
    """Lets `importlib.metadata` report other versions; None is a package that is not there."""
    real = doctor.metadata.version

    def install(**versions):
        def version(name):
            key = name.replace("-", "_")
            if key not in versions:
                return real(name)
            if versions[key] is None:
                raise PackageNotFoundError(name)
            return versions[key]

        monkeypatch.setattr(doctor.metadata, "version", version)

    return install


def test_a_missing_extra_says_what_it_would_enable_and_how(pretend, capsys):
    pretend(onnxruntime=None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    tested = doctor.tested_versions()["onnxruntime"]
    assert f"onnxruntime is missing: needs >=1.23, tested with {tested}" in out
    assert "pip install 'edgegen[onnx]'" in out
    assert "`.onnx` for Linux" in out


def test_versions_differ_or_are_not_supported(pretend, capsys):
    pretend(coremltools="9.1", executorch="1.5.1")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "coremltools 9.1 differs, tested with 9.0" in out
    assert "executorch 1.5.1 is not supported: needs >=1.4.1,<1.5" in out


@pytest.mark.parametrize("broken", [None, "1.0.0"])
def test_a_broken_core_is_exit_1_after_the_report(pretend, capsys, broken):
    pretend(torch=broken)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "torch" in captured.out
    assert captured.err.startswith("error: edgegen cannot work here without all of its core dependencies")
    assert "hint: pip install edgegen" in captured.err


@pytest.mark.parametrize(
    ("version", "specifier", "met"),
    [
        ("2.13.0+cpu", ">=2.10,<2.14", True),
        ("2.14.0", ">=2.10,<2.14", False),
        ("2.9.1", ">=2.10,<2.14", False),
        ("2.10", ">=2.10.0", True),
        ("10.0", ">=9.0,<10", False),
        ("1.0.0b3", "==1.0.0b3", True),
        ("1.0.0b4", "==1.0.0b3", False),
        ("5", "", True),
    ],
)
def test_satisfies(version, specifier, met):
    assert doctor.satisfies(version, specifier) is met


def test_looks_at_packages_without_importing_them():
    code = (
        "import sys; from edgegen.cli.main import main; main(['doctor', '-q']);"
        "heavy = {'torch', 'numpy', 'coremltools', 'onnx', 'onnxruntime', 'executorch', 'pydantic'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
