"""Manifests that say that several components are functions of one package: what agrees opens, all else is refused."""

from __future__ import annotations

import json

import pytest

from edgegen.bundle.manifest import stored_bytes
from edgegen.bundle.open import MANIFEST, open_bundle
from edgegen.errors import EdgegenError

PACKAGE = "components/coreml/model.mlpackage"
FUNCTIONS = {"text_encoder": "encode", "denoiser": "denoise", "decoder": "decode"}
EMPTY_OBJECT = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
"""sha256 of `{}`."""


@pytest.fixture
def shared(tiny_bundle):
    """The bundle with Core ML artifacts that all are one folder, and a way to change what is said of each."""
    (tiny_bundle / PACKAGE / "Data").mkdir(parents=True)
    for name in ("Manifest.json", "Data/model"):
        (tiny_bundle / PACKAGE / name).write_text("{}")

    def say(**changes):
        document = json.loads((tiny_bundle / MANIFEST).read_text())
        entry = {"sha256": EMPTY_OBJECT, "bytes": 2}
        document["files"] |= {f"{PACKAGE}/Manifest.json": entry, f"{PACKAGE}/Data/model": entry}
        pattern = document["artifacts"][0] | {"backend": "coreml", "path": PACKAGE, "bytes": 4}
        document["artifacts"] = [one for one in document["artifacts"] if one["backend"] == "onnx"] + [
            pattern | {"component": name, "function": function} | changes.get(name, {})
            for name, function in FUNCTIONS.items()
        ]
        (tiny_bundle / MANIFEST).write_text(json.dumps(document))
        return tiny_bundle

    return say


def test_functions_of_one_package_open_and_count_once(shared):
    bundle = open_bundle(shared())
    assert bundle.backends() == ("coreml", "onnx")
    artifacts = bundle.artifacts("coreml")
    assert {name: one.function for name, one in artifacts.items()} == FUNCTIONS
    assert stored_bytes(artifacts.values()) == 4
    mixed = open_bundle(shared(denoiser={"precision": "fp16"}))
    assert mixed.artifacts("coreml")["denoiser"].precision == "fp16", "a plan may mix them"
    assert bundle.loadable(artifacts["decoder"]) == bundle.root / PACKAGE / "decode"
    alone = bundle.artifacts("onnx")["decoder"]
    assert alone.function is None and bundle.loadable(alone) == bundle.path(alone.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"denoiser": {"bytes": 5}},
            r"`components/coreml/model.mlpackage` of `denoiser` is said to have 5 bytes, .* 4",
        ),
        ({"denoiser": {"function": None}}, r"`text_encoder`, `denoiser`, `decoder` are all said to be .* without a"),
        ({"denoiser": {"function": "encode"}}, "without a function of its own each"),
        ({"denoiser": {"backend": "coreai"}}, "is said to be of coreai and of coreml"),
        ({"denoiser": {"path": f"{PACKAGE}/Data", "bytes": 2}}, r"Data` .*, which only a `.mlpackage` has|is inside"),
        ({"denoiser": {"path": f"{PACKAGE}/Data", "bytes": 2, "function": None}}, "is inside artifact"),
        ({"denoiser": {"path": "components/onnx/denoiser.onnx"}}, "are all said to be|is said to have"),
        ({"denoiser": {"path": "../model.mlpackage"}}, "no plain path inside the bundle"),
    ],
)
def test_what_does_not_agree_is_refused(shared, changes, message):
    root = shared(**changes)
    with pytest.raises(EdgegenError, match=message):
        open_bundle(root)


@pytest.mark.parametrize(
    "function", ["", "two words", "../encode", "a/b", "a\\b", "é", "1st", "a\n", "a\u0000", "\u202eedocne", "x" * 64, 7]
)
def test_odd_names_of_functions_are_refused(shared, function):
    root = shared(denoiser={"function": function})
    with pytest.raises(EdgegenError, match=r"no manifest: at `artifacts.\d.function`"):
        open_bundle(root)


def test_only_packages_have_functions(tiny_bundle):
    document = json.loads((tiny_bundle / MANIFEST).read_text())
    document["artifacts"][0]["function"] = "encode"
    (tiny_bundle / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(EdgegenError, match=r"names a function, which only a `.mlpackage` has"):
        open_bundle(tiny_bundle)
