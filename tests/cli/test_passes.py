"""`edgegen passes`: list, show, run on a model and on a `.pt2`, verify, dump, shrink."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgegen.cli.main import main
from edgegen.graph.edit import Editor
from edgegen.rewrite import registry
from edgegen.rewrite.base import Pass, Rewritten
from edgegen.students.load import load
from edgegen.students.shapes.family import WEIGHTS

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, timestep):
        for layer in self.layers:
            x = torch.tanh(layer(x.clone())) + timestep.cos()
        return x


@dataclass(frozen=True)
class BreaksLastTanh(Pass):
    """A defect planted by this test."""

    factor: float = 1.5
    """What the last tanh is multiplied by."""

    name: ClassVar[str] = "breaks-last-tanh"

    def call(self, program):
        editor = Editor(program, self.name)
        found = editor.nodes(aten.tanh.default)[-1:]
        if not found or any(user.target is aten.mul.Tensor for user in found[0].users):
            return Rewritten(program, False)
        with editor.at(next(iter(found[0].users))):
            made = editor.call(aten.mul.Tensor, found[0], self.factor)
        found[0].replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        return Rewritten(editor.finish(), True)


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    known = registry.all_passes()
    monkeypatch.setattr(registry, "all_passes", lambda: {**known, "breaks-last-tanh": BreaksLastTanh})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.export.save(torch.export.export(Net().eval(), (torch.randn(2, 4), torch.randn(1))), path)
    return path


def run(*arguments):
    return main(["passes", *(str(argument) for argument in arguments)])


def test_list_names_every_pass_with_options_and_tolerance(capsys):
    assert run("list") == 0
    text = capsys.readouterr().out
    for name in registry.all_passes():
        assert any(line.startswith(f"{name} ") for line in text.splitlines())
    assert '{input: str = "timestep"}' in text
    assert "{factor: float = 1.5} What the last tanh is multiplied by." in text
    assert run("list", "--json") == 0
    data = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert list(data) == list(registry.all_passes())
    values, *_ = data["specialise-timestep"]["options"]
    assert (values["name"], values["required"], values["default"]) == ("values", True, None)
    assert data["remove-identities"]["tolerance"] == 0.0 and data["specialise-timestep"]["changes_signature"]
    assert all(one["says"] for one in data.values())


def test_show_has_the_graph_before_and_after(capsys):
    assert run("show", "fold-constants") == 0
    text = capsys.readouterr().out
    assert text.startswith("fold-constants\n\n")
    assert "->" in text and "Declines" in text and "numbers stay the same bits" in text
    assert run("show", "specialise-timestep", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert "Declines" in data["docstring"] and data["name"] == "specialise-timestep"


def test_an_unknown_pass_has_a_hint(capsys):
    assert run("show", "fold-constant") == 2
    assert "hint: did you mean `fold-constants`" in capsys.readouterr().err


def test_run_on_a_component_of_a_student(capsys):
    assert run("run", WEIGHTS, "--component", "decoder", "--passes", "remove-identities") == 0
    assert "decoder now takes latent float32[1, 4, 16, 16]" in capsys.readouterr().out


def test_run_verifies_times_dumps_and_writes(capsys, model, tmp_path):
    specs = "remove-identities, specialise-timestep{values=[999.0, 499.0]}, drop-unused-inputs"
    arguments = ("run", model, "--passes", specs, "--verify", "--time-passes")
    out = tmp_path / "folded.pt2"
    assert run(*arguments, "--dump-ir", tmp_path / "ir", "-o", out) == 0
    text = capsys.readouterr().out
    header, first, second, third, *rest = text.splitlines()
    assert header.split() == ["PASS", "OPS", "CHANGED", "DECLINED", "SECONDS", "ERROR"]
    assert first.split()[0] == "remove-identities" and first.split()[-1] == "0"
    assert second.split()[-1] == "0" and third.split()[-1] == "-"
    assert "step int32[1]" in rest[-2] and rest[-1] == f"written to {out}"
    assert [path.name for path in sorted((tmp_path / "ir").iterdir())] == [
        "00-input.txt",
        "01-remove-identities.txt",
        "02-specialise-timestep.txt",
    ]
    assert [spec.name for spec in load(out).components["model"].inputs] == ["x", "step"]


def test_run_as_json_on_a_pt2(capsys, model):
    assert run("run", model, "--passes", "remove-identities", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["component"] == "model" and data["errors"] is None
    (record,) = data["passes"]
    assert record["removed"] == {"aten.clone": 4} and record["modified"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((WEIGHTS, "--passes", "remove-identities"), 2, "several components"),
        ((WEIGHTS, "--component", "other", "--passes", "remove-identities"), 2, "no component `other`"),
        (("{model}", "--passes", "unknown"), 2, "there is no pass `unknown`"),
        (("{model}", "--passes", "fold-constants, fold-constants"), 2, "twice"),
        (("{model}", "--passes", "remove-identities", "-o", "out.onnx"), 2, "does not end in `.pt2`"),
        (("{model}", "--passes", "remove-identities", "-o", "missing/out.pt2"), 1, "cannot be written"),
        (("missing.pt2", "--passes", "remove-identities"), 1, "missing.pt2"),
    ],
)
def test_what_is_wrong_is_said(capsys, model, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    assert run("run", *(str(one).format(model=model) for one in arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"x": torch.ones(2, 4)}, "has no tensor `timestep`"),
        ({"x": torch.ones(2, 5), "timestep": torch.ones(1)}, "is float32[2, 5]"),
        ({"x": torch.ones(2, 4).int(), "timestep": torch.ones(1)}, "is int32[2, 4]"),
    ],
)
def test_inputs_that_do_not_fit(capsys, model, tmp_path, held, said):
    path = tmp_path / "inputs.safetensors"
    save_file(held, path)
    assert run("run", model, "--passes", "remove-identities", "--inputs", path, "--verify") == 2
    assert said in capsys.readouterr().err


def test_a_pass_beyond_its_tolerance_exits_3_and_leaves_no_output(capsys, model, tmp_path):
    out = tmp_path / "out.pt2"
    specs = "remove-identities, breaks-last-tanh{factor=2.0}"
    assert run("run", model, "--passes", specs, "--verify", "-o", out) == 3
    captured = capsys.readouterr()
    assert "pass `breaks-last-tanh{factor=2.0}` changed output 0" in captured.err and captured.out == ""
    assert not out.exists()
    assert run("run", model, "--passes", specs, "-o", out) == 0 and out.exists()


def test_shrink_leaves_a_command_that_shows_the_same_failure(capsys, model, tmp_path, monkeypatch):
    folder = tmp_path / "small"
    specs = "remove-identities, breaks-last-tanh{factor=2.0}"
    assert run("run", model, "--passes", specs, "--shrink", folder) == 3
    said = capsys.readouterr().err
    assert "1 ops still fail" in said and said.endswith(
        f"hint: `sh {folder}/reproduce.sh` shows it on the smallest graph\n"
    )
    command = (folder / "reproduce.sh").read_text().partition("exec ")[2]
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(command)
    assert program == "edgegen" and main(arguments) == 3
    assert "changed output 0" in capsys.readouterr().err


def test_shrink_writes_nothing_when_nothing_fails(model, tmp_path):
    assert run("run", model, "--passes", "remove-identities", "--shrink", tmp_path / "small") == 0
    assert not (tmp_path / "small").exists()
