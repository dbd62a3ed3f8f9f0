"""Students pruned without healing are built, executed and gated like any other; all five backends of each:
`tools/prune_conformance.py`."""

import importlib
from pathlib import Path

import pytest

from edgegen.cli.main import main
from edgegen.students.checkpoint import save_pt

TOOLS = str(Path(__file__).parents[2] / "tools")


@pytest.mark.parametrize(("name", "target", "backend"), [("snapgen", "linux-x86", "onnx")])
def test_a_pruned_student_builds_like_any_other(name, target, backend, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)
    model, small = str(tmp_path / "model.pt"), str(tmp_path / "small.pt")
    save_pt(importlib.import_module("prune_conformance").student(name), Path(model))
    assert main(["prune", model, "-o", small, "--ratio", "0.4", "--target", target, "--uniform", "-q"]) == 0
    built = main(["build", "--target", target, "--backend", backend, "-q", "-o", str(tmp_path / "bundle"), small])
    assert built == 0, capsys.readouterr().err
