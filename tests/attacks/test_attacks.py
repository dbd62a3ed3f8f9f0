"""Every abuse in this folder, against naive loading, so that the test can fail, and against `load`."""

import importlib.util
import sys
from pathlib import Path

import pytest

from edgegen.errors import EdgegenError
from edgegen.students.load import load

HERE = Path(__file__).parent
NOT_ATTACKS = {"craft", "diffusers_configs", "test_attacks"}
ABUSES = sorted(script.stem for script in HERE.glob("*.py") if script.stem not in NOT_ATTACKS)


@pytest.fixture
def abuse(request, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    spec = importlib.util.spec_from_file_location(f"attack_{request.param}", HERE / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_script_for_each_abuse():
    assert len(ABUSES) >= 20


@pytest.mark.parametrize("abuse", ABUSES, indirect=True)
def test_refused_without_running_anything(abuse, tmp_path):
    (tmp_path / "here").mkdir()
    path, canary = tmp_path / "here" / f"model{getattr(abuse, 'SUFFIX', '.pt')}", tmp_path / "canary"
    abuse.make(path, canary)
    assert not canary.exists(), "crafting the file must not set it off"

    with pytest.raises(EdgegenError) as refused:
        load(path)
    assert not canary.exists(), "loading ran the attack"
    assert refused.value.exit_code == abuse.EXIT
    assert abuse.FINDS in refused.value.message
    assert refused.value.hint

    try:
        abuse.naive(path, canary)
    except Exception as error:  # what a naive loader raises after the fact is its own affair
        print(f"naive loading ended with {error!r}")
    assert canary.exists(), "the attack does not work, so the refusal proves nothing"
