"""The data that ships: complete, reasoned, and in step with the code that uses it."""

import json
import re
import tomllib
from typing import get_args

import jsonschema
import pytest

from edgegen.lower.backend import BACKENDS, Precision, get_backend
from edgegen.targets import list_targets, load_target
from edgegen.targets.model import OPTIONS, BackendName, BuildPrecision
from edgegen.targets.read import data_folder, validate
from edgegen.targets.schema import schema, schema_text

APPLE = ["iphone13", "iphone15", "iphone15pro", "iphone16pro", "iphone17", "ipad-m4"]
ANDROID = ["pixel8", "pixel9", "galaxy-s24", "galaxy-s25"]
REQUIRED = [*APPLE, *ANDROID, "rpi4", "rpi5", "jetson-orin-nano", "linux-x86", "linux-arm64", "web"]
FILES = sorted(data_folder().rglob("*.toml"))


def test_every_required_device_ships():
    assert set(REQUIRED) <= set(list_targets())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(data_folder()).as_posix())
def test_every_file_is_valid_by_model_and_by_schema(path):
    validate(path)
    data = tomllib.loads(path.read_text())
    jsonschema.validate(data, schema(), cls=jsonschema.Draft202012Validator)
    assert data["name"] == path.stem


def test_schema_file_is_what_the_models_emit():
    assert (data_folder() / "schema.json").read_text() == schema_text()
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text()))


@pytest.mark.parametrize("name", ["iphone15", "web"])
def test_schema_refuses_what_the_model_refuses(name):
    data = tomllib.loads((data_folder() / f"{name}.toml").read_text())
    for change in ({"colour": "blue"}, {"chipset": "../x"}, {"memory_bytes": "much"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data | change, schema(), cls=jsonschema.Draft202012Validator)


def test_names_are_in_step_with_the_backends():
    assert set(get_args(BackendName)) == set(BACKENDS) == set(OPTIONS)
    assert get_args(BuildPrecision) == get_args(Precision)


@pytest.mark.parametrize("name", REQUIRED)
def test_every_backend_is_offered_or_denied_with_a_reason(name):
    target = load_target(name)
    assert set(target.backends) | set(target.denied_backends) == set(BACKENDS)
    assert not set(target.backends) & set(target.denied_backends)
    denials = [*target.device.denied_backends, *(d for b in target.backends for d in target.backend(b).denied_ops)]
    for denial in denials:
        assert len(denial.reason.split()) >= 2
        assert denial.reference


@pytest.mark.parametrize("name", REQUIRED)
def test_what_a_target_builds_is_what_its_backends_can_make(name):
    target = load_target(name)
    for backend in target.backends:
        spec = target.backend(backend)
        assert spec.default_precision in get_backend(backend).precisions
        assert spec.default_precision in spec.precisions
        assert all(isinstance(value, str) for value in spec.options.values())
        assert set(spec.options) <= set(OPTIONS[backend])


def test_apple_targets_state_a_deployment_target_that_their_floor_has():
    for name in list_targets():
        target = load_target(name)
        if "coreml" in target.backends:
            stated = target.backend("coreml").options["minimum_deployment_target"]
            assert int(stated.removeprefix("iOS")) <= int(target.os_floor.split(".")[0])


def test_every_denied_op_exists_in_aten():
    torch = pytest.importorskip("torch")
    for path in (data_folder() / "delegates").glob("*.toml"):
        for denied in tomllib.loads(path.read_text()).get("denied_ops", []):
            if denied["op"] != "*":
                assert hasattr(torch.ops.aten, denied["op"].split(".")[1]), (path.name, denied["op"])


def test_iphone15_is_what_the_issue_asks_for():
    target = load_target("iphone15")
    assert target.backends == ("coreml", "executorch", "onnx", "tflite")
    assert target.os_floor == "17.0"
    assert target.backend("coreml").default_precision == "fp16"
    assert target.backend("coreml").options == {"minimum_deployment_target": "iOS17"}
    assert "iOS 27" in target.denied_backends["coreai"]
    assert "w8a8" not in target.backend("coreml").precisions  # int8 by int8 begins with the A17 Pro
    assert "w8a8" in load_target("iphone15pro").backend("coreml").precisions
    with pytest.raises(KeyError):
        target.backend("coreai")


def test_five_backends_where_core_ai_is():
    for name in ("iphone17", "ipad-m4"):
        assert set(load_target(name).backends) == set(BACKENDS)
        assert load_target(name).os_floor == "27.0"
        for on in ("coreml", "coreai"):  # int8 by int8, which both files hold and both chips have
            offered = load_target(name).backend(on)
            assert "w8a8" in offered.precisions and "w8a8-dynamic" not in offered.precisions
            assert offered.cost("conv", "w8a8").time < offered.cost("conv", "w8").time


def test_a_core_without_float16_is_not_given_any():
    assert "fp16" not in load_target("rpi4").backend("executorch").precisions
    assert "fp16" in load_target("rpi5").backend("executorch").precisions


def test_every_chipset_and_delegate_is_used():
    used = {load_target(name).device.chipset for name in list_targets()}
    assert used == {path.stem for path in (data_folder() / "chipsets").glob("*.toml")}
    used = {d.name for name in list_targets() for group in load_target(name).delegates for d in group}
    assert used == {path.stem for path in (data_folder() / "delegates").glob("*.toml")}


def test_sha256_follows_the_content_and_not_the_layout(tmp_path):
    text = (data_folder() / "iphone15.toml").read_text()
    same, other = tmp_path / "same.toml", tmp_path / "other.toml"
    same.write_text("# a comment\n\n" + text)
    other.write_text(text.replace('title = "iPhone 15"', 'title = "iPhone 15 Plus"'))
    base = load_target("iphone15").sha256
    assert re.fullmatch(r"[0-9a-f]{64}", base)
    assert load_target(same).sha256 == base
    assert load_target(other).sha256 != base
    (tmp_path / "delegates").mkdir()
    delegate = (data_folder() / "delegates" / "neural-engine.toml").read_text()
    (tmp_path / "delegates" / "neural-engine.toml").write_text(delegate.replace("Core ML on", "Core ML upon"))
    assert load_target(same).sha256 != base
