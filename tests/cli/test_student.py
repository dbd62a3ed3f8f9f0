import json

import pytest
import torch

from edgegen.cli.main import main
from edgegen.students.load import load
from edgegen.students.shapes.family import WEIGHTS


def test_pack_writes_the_student_that_ships(shapes, tmp_path, capsys):
    path = tmp_path / "new folder" / "model.pt"
    assert main(["student", "pack", "-o", str(path), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == shapes.fingerprint
    assert load(path).fingerprint == shapes.fingerprint


@pytest.mark.parametrize("nested", [True, False])
def test_a_plain_state_dict_is_packed_with_its_config(shapes, tmp_path, nested, capsys):
    parts = {name: part.module.state_dict() for name, part in shapes.components.items()}
    flat = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    torch.save(parts if nested else flat, tmp_path / "plain.pt")
    packed = tmp_path / "packed.pt"
    assert main(["student", "pack", str(tmp_path / "plain.pt"), "-o", str(packed), "-q"]) == 1
    assert "--config" in capsys.readouterr().err
    config = str(WEIGHTS.with_suffix(".json"))
    assert main(["student", "pack", str(tmp_path / "plain.pt"), "--config", config, "-o", str(packed), "-q"]) == 0
    assert load(packed).fingerprint == shapes.fingerprint


def test_config_without_a_source_is_a_usage_error(tmp_path, capsys):
    assert main(["student", "pack", "--config", "x.json", "-o", str(tmp_path / "y.pt")]) == 2
    assert "hint:" in capsys.readouterr().err


def test_eval_refuses_steps_and_backends_that_are_not_there(capsys):
    assert main(["student", "eval", "--steps", "3"]) == 2
    assert "--steps 4" in capsys.readouterr().err
    assert main(["student", "eval", "--backend", "onnx"]) == 2
    assert "bundles" in capsys.readouterr().err


def test_eval_reports_each_share_with_its_count(capsys):
    assert main(["student", "eval", "--limit", "16", "--steps", "1", "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompts"] == 16 == report["one_object_prompts"] + report["two_objects_prompts"]
    assert 0 <= report["shuffled"] <= report["alignment"] <= 1
