import json

import pytest

from edgegen.cli.main import main
from edgegen.targets import list_targets
from edgegen.targets.read import data_folder
from edgegen.targets.schema import schema_text


def test_list_is_a_table_and_json(capsys):
    assert main(["targets", "list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(list_targets())
    assert main(["targets", "list", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in data] == list(list_targets())
    iphone = next(entry for entry in data if entry["name"] == "iphone15")
    assert iphone["backends"][0] == "coreml"


def test_show_has_every_reason_and_reference(capsys):
    assert main(["targets", "show", "rpi4"]) == 0
    text = capsys.readouterr().out
    assert main(["targets", "show", "rpi4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    denied = data["device"]["denied_backends"] + data["delegates"]["executorch-xnnpack"]["denied_ops"]
    assert len(denied) > 5
    for denial in denied:
        assert denial["reason"] in text
        assert denial["reference"] in text


def test_show_toml_is_a_start_for_ones_own(capsys, tmp_path):
    assert main(["targets", "show", "iphone15", "--toml"]) == 0
    mine = tmp_path / "mine.toml"
    mine.write_text(capsys.readouterr().out)
    assert main(["targets", "validate", str(mine)]) == 0
    assert main(["targets", "show", str(mine)]) == 0


def test_show_of_an_unknown_target(capsys):
    assert main(["targets", "show", "iphnoe15"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: target `iphnoe15` is unknown; nearest: `iphone15`")
    assert captured.err.endswith("\n\nhint: edgegen targets list\n")


def test_terminal_escapes_in_a_file_are_shown_and_not_sent(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    text = (data_folder() / "iphone15.toml").read_text()
    path.write_text(text.replace('title = "iPhone 15"', 'title = "\\u001b[2J phone"'))
    assert main(["targets", "show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2J phone" in out


def test_validate_says_file_key_message_and_exits_2(capsys, tmp_path):
    good, bad = data_folder() / "web.toml", tmp_path / "bad.toml"
    bad.write_text((data_folder() / "web.toml").read_text().replace('floor = "1"', "floor = 1"))
    assert main(["targets", "validate", str(good)]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "1 target file is valid\n")
    assert main(["targets", "validate", "-q", str(good)]) == 0
    assert capsys.readouterr().err == ""
    assert main(["targets", "validate", str(good), str(bad)]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{bad}:os.floor: input should be a valid string\n"
    assert captured.err.startswith("error: 1 of 2 target files is not valid\n\nhint: ")
    assert main(["targets", "validate", "--json", str(good), str(bad)]) == 2
    assert [entry["valid"] for entry in json.loads(capsys.readouterr().out)] == [True, False]


@pytest.mark.parametrize("kind", ["chipsets/a16.toml", "delegates/litert-gpu.toml"])
def test_validate_takes_the_other_kinds_too(capsys, tmp_path, kind):
    assert main(["targets", "validate", str(data_folder() / kind)]) == 0
    broken = tmp_path / "broken.toml"
    broken.write_text((data_folder() / kind).read_text().replace("title", "tilte", 1))
    assert main(["targets", "validate", str(broken)]) == 2
    assert f"{broken}:title: is missing" in capsys.readouterr().out


def test_validate_emits_the_schema(capsys):
    assert main(["targets", "validate", "--emit-schema"]) == 0
    assert capsys.readouterr().out == schema_text()
    assert main(["targets", "validate", "--emit-schema", "x.toml"]) == 2
    assert main(["targets", "validate"]) == 2
