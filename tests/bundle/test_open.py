"""A bundle is believed only after it was checked; a hostile manifest is refused by name."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from edgegen.bundle.open import MANIFEST, open_bundle, relative_path
from edgegen.errors import EdgegenError, UnsafeError, UsageError

DENOISER = "components/onnx/denoiser.onnx"


def edit(root, change) -> None:
    document = json.loads((root / MANIFEST).read_text())
    change(document)
    (root / MANIFEST).write_text(json.dumps(document))


def test_a_good_bundle_opens(tiny_bundle, tiny_contents):
    bundle = open_bundle(tiny_bundle)
    assert bundle.extra_files == ()
    assert bundle.backends() == ("onnx",)
    assert list(bundle.manifest.components) == ["text_encoder", "denoiser", "decoder"]
    assert bundle.manifest.sampler == tiny_contents.manifest.sampler
    assert bundle.path(DENOISER).stat().st_size == bundle.artifacts("onnx")["denoiser"].bytes


def test_reports_may_change_and_go(tiny_bundle):
    (tiny_bundle / "report.html").write_text("mine")
    shutil.rmtree(tiny_bundle / "reports")
    assert open_bundle(tiny_bundle).extra_files == ()


def test_a_flipped_bit_is_found_and_the_file_is_named(tiny_bundle):
    path = tiny_bundle / DENOISER
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(EdgegenError, match=f"damaged: `{DENOISER}`"):
        open_bundle(tiny_bundle)
    assert open_bundle(tiny_bundle, check_hashes=False)


@pytest.mark.parametrize("hashes", [True, False])
def test_missing_and_cut_files_are_named(tiny_bundle, hashes):
    (tiny_bundle / DENOISER).write_bytes((tiny_bundle / DENOISER).read_bytes()[:-1])
    with pytest.raises(EdgegenError, match=DENOISER):
        open_bundle(tiny_bundle, check_hashes=hashes)
    (tiny_bundle / DENOISER).unlink()
    (tiny_bundle / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(EdgegenError, match=f"lacks `{DENOISER}`, `tokenizer/tokenizer.json`"):
        open_bundle(tiny_bundle, check_hashes=hashes)


def test_extra_files_are_named_and_inside_a_package_refused(tiny_bundle):
    (tiny_bundle / "notes.txt").write_text("mine")
    assert open_bundle(tiny_bundle).extra_files == ("notes.txt",)
    package = tiny_bundle / "components/coreml/denoiser.mlpackage"
    package.mkdir(parents=True)
    (package / "Manifest.json").write_text("{}")

    def add(document):
        sha = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        document["files"]["components/coreml/denoiser.mlpackage/Manifest.json"] = {"sha256": sha, "bytes": 2}
        one = next(a for a in document["artifacts"] if a["component"] == "denoiser")
        path = "components/coreml/denoiser.mlpackage"
        document["artifacts"].append({**one, "backend": "coreml", "path": path, "bytes": 2})

    edit(tiny_bundle, add)
    assert open_bundle(tiny_bundle).backends() == ("onnx",), "coreml has one component of three"
    (package / "weights.bin").write_text("planted")
    with pytest.raises(EdgegenError, match=r"weights\.bin"):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize("kind", ["nowhere", "file", "empty", "folder"])
def test_what_is_no_bundle(kind, tmp_path):
    path = tmp_path / "thing"
    if kind == "file":
        path.write_text("")
    elif kind != "nowhere":
        path.mkdir()
        if kind == "folder":
            (path / "model.pt").write_text("")
    with pytest.raises(UsageError) as caught:
        open_bundle(path)
    assert str(path) in caught.value.message and "edgegen build" in caught.value.hint


def test_a_newer_schema_says_so(tiny_bundle):
    edit(tiny_bundle, lambda d: d.update(schema_version=2, wonder="new"))
    with pytest.raises(EdgegenError, match="schema version 2, this edgegen reads 1") as caught:
        open_bundle(tiny_bundle)
    assert caught.value.hint == "pip install --upgrade edgegen"


HOSTILE_PATHS = [
    "/etc/passwd",
    "../outside",
    "components/../../outside",
    "components//x",
    "./x",
    "x/",
    "",
    "c:\\x",
    "a\\b",
    "a\nb",
    "a\x00b",
    "x" * 2000,
]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_paths_that_leave_the_folder_are_unsafe(path):
    with pytest.raises(UnsafeError):
        relative_path(path)


def _at(*keys):
    def change(document, value):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


@pytest.mark.parametrize("where", [("tokenizer",), ("artifacts", 0, "path")])
@pytest.mark.parametrize("path", ["/etc/passwd", "../../outside"])
def test_hostile_paths_in_a_manifest_exit_5(tiny_bundle, where, path):
    edit(tiny_bundle, lambda d: _at(*where)(d, path))
    with pytest.raises(UnsafeError) as caught:
        open_bundle(tiny_bundle)
    assert caught.value.exit_code == 5


def test_hostile_path_in_the_file_list(tiny_bundle, tmp_path):
    (tmp_path / "secret").write_text("x")
    edit(tiny_bundle, lambda d: d["files"].update({"../secret": {"sha256": "0", "bytes": 1}}))
    with pytest.raises(UnsafeError, match="secret"):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize("target", ["/etc/passwd", "text_encoder.onnx"])
def test_links_are_unsafe_wherever_they_point(tiny_bundle, target):
    (tiny_bundle / DENOISER).unlink()
    (tiny_bundle / DENOISER).symlink_to(target)
    with pytest.raises(UnsafeError, match=r"denoiser\.onnx"):
        open_bundle(tiny_bundle)


def test_a_linked_folder_and_a_linked_manifest_are_unsafe(tiny_bundle, tmp_path):
    (tiny_bundle / "components").rename(tmp_path / "components")
    (tiny_bundle / "components").symlink_to(tmp_path / "components")
    with pytest.raises(UnsafeError, match="components"):
        open_bundle(tiny_bundle)
    (tiny_bundle / MANIFEST).rename(tmp_path / MANIFEST)
    (tiny_bundle / MANIFEST).symlink_to(tmp_path / MANIFEST)
    with pytest.raises(UnsafeError, match=MANIFEST):
        open_bundle(tiny_bundle)


def test_a_pipe_never_blocks(tiny_bundle):
    os.mkfifo(tiny_bundle / "pipe")
    with pytest.raises(UnsafeError, match="pipe"):
        open_bundle(tiny_bundle)
    (tiny_bundle / MANIFEST).unlink()
    os.mkfifo(tiny_bundle / MANIFEST)
    with pytest.raises(UnsafeError, match=MANIFEST):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", EdgegenError),
        ("{", EdgegenError),
        ("[]", EdgegenError),
        ("null", EdgegenError),
        ('"text"', EdgegenError),
        ("\xff", EdgegenError),
        ('{"a": 1, "a": 2}', EdgegenError),
        ('{"schema_version": "1"}', EdgegenError),
        ("[" * 200_000, UnsafeError),
        ('{"a":' * 200_000, UnsafeError),
        (" " * (16 * 2**20 + 1), UnsafeError),
    ],
)
def test_files_that_are_no_manifest(tiny_bundle, text, kind):
    (tiny_bundle / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(EdgegenError) as caught:
        open_bundle(tiny_bundle)
    assert type(caught.value) is kind
    assert len(caught.value.message) < 500, "what is in a hostile file is not repeated at length"


STEP = ("sampler", "tables", "2", 0)


@pytest.mark.parametrize(
    ("where", "value", "kind"),
    [
        (("components", "denoiser", "inputs", 0, "shape"), [1, 2**40], UnsafeError),
        (("components", "denoiser", "inputs", 0, "shape"), [10**30], UnsafeError),
        (("components", "denoiser", "inputs", 0, "shape"), [-1, 4], UnsafeError),
        (("latent", "shape"), [2**20, 2**20], UnsafeError),
        (("components",), {}, EdgegenError),
        (("components",), [], EdgegenError),
        (("artifacts",), "none", EdgegenError),
        (("files",), {}, EdgegenError),
        (("sampler", "tables", "2"), [], EdgegenError),
        (("sampler", "tables"), {}, EdgegenError),
        (("sampler", "tables", "1000000"), [], EdgegenError),
        (("sampler", "tables", "many"), [], EdgegenError),
        ((*STEP, "sample"), 1e999, EdgegenError),
        ((*STEP, "surprise"), 1, EdgegenError),
        (("latent", "scale"), None, EdgegenError),
        (("name",), 5, EdgegenError),
        (("task",), "format-disk", EdgegenError),
    ],
)
def test_wrong_values_in_a_manifest(tiny_bundle, where, value, kind):
    edit(tiny_bundle, lambda d: _at(*where)(d, value))
    text = (tiny_bundle / MANIFEST).read_text()
    (tiny_bundle / MANIFEST).write_text(text.replace("Infinity", "1e999"))
    with pytest.raises(EdgegenError) as caught:
        open_bundle(tiny_bundle)
    assert type(caught.value) is kind


def test_two_artifacts_for_one_place(tiny_bundle):
    edit(tiny_bundle, lambda d: d["artifacts"].append(d["artifacts"][0]))
    with pytest.raises(EdgegenError, match="two artifacts"):
        open_bundle(tiny_bundle)
