"""Bundles appear whole or not at all, and nothing that was there before is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import edgegen.bundle.stage as stage_module
import edgegen.bundle.write as write_module
from edgegen.bundle.manifest import Manifest
from edgegen.bundle.open import open_bundle
from edgegen.bundle.write import manifest_json, reserve, schema_json, write_bundle
from edgegen.errors import EdgegenError, UsageError

SCHEMA = Path(stage_module.__file__).with_name("manifest.schema.json")


def bytes_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def named(contents, name: str):
    return dataclasses.replace(contents, manifest=contents.manifest.model_copy(update={"name": name}))


def test_layout_manifest_and_schema(tiny_bundle, tiny_contents):
    written = bytes_of(tiny_bundle)
    listed = {
        "components/onnx/decoder.onnx",
        "components/onnx/denoiser.onnx",
        "components/onnx/text_encoder.onnx",
        "tokenizer/tokenizer.json",
    }
    unlisted = {"manifest.json", "report.html", "reports/onnx.log", "reports/parity.json"}
    assert set(written) == listed | unlisted
    document = json.loads(written["manifest.json"])
    assert set(document["files"]) == listed
    assert list(document["components"]) == list(tiny_contents.manifest.components)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(document)
    assert json.loads(written["reports/parity.json"]) == {"sqnr_db": "Infinity"}
    assert Manifest.model_validate_json(written["manifest.json"]).sampler == tiny_contents.manifest.sampler
    assert b"\r" not in written["manifest.json"] and written["manifest.json"].endswith(b"}\n")


def test_a_large_file_that_never_changes_is_linked_and_not_copied(tiny_contents, tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "LINKED_FROM", 1)
    files = {path: "ab" * 32 for _, folder in tiny_contents.artifacts for path in folder.rglob("*.onnx")}
    whole = write_bundle(tmp_path / "whole", dataclasses.replace(tiny_contents, linkable=dict([*files.items()][:1])))
    (linked,) = (path for path in whole.rglob("*.onnx") if path.stat().st_nlink == 2)
    assert linked.samefile(next(iter(files)))
    assert not linked.stat().st_mode & 0o222, "other bundles share it"
    document = json.loads((whole / "manifest.json").read_text())
    assert document["files"][linked.relative_to(whole).as_posix()]["sha256"] == "ab" * 32
    assert sum(one["sha256"] == "ab" * 32 for one in document["files"].values()) == 1
    again = write_bundle(tmp_path / "whole", dataclasses.replace(tiny_contents, linkable=files))  # replaces it
    assert linked.stat().st_nlink == 2 and again == whole


def test_what_cannot_be_linked_is_copied(tiny_contents, tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "LINKED_FROM", 1)

    def refuse(self, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    files = {path: "ab" * 32 for _, folder in tiny_contents.artifacts for path in folder.rglob("*.onnx")}
    whole = write_bundle(tmp_path / "whole", dataclasses.replace(tiny_contents, linkable=files))
    assert open_bundle(whole)  # with the hashes of what was copied
    assert all(path.stat().st_nlink == 1 for path in whole.rglob("*.onnx"))


def test_the_published_schema_is_the_models():
    assert SCHEMA.read_text() == schema_json(), "write schema_json() to edgegen/bundle/manifest.schema.json"


def test_the_schema_refuses_what_the_model_refuses(tiny_contents):
    document = json.loads(manifest_json(tiny_contents.manifest))
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert validator.is_valid(document)
    assert not validator.is_valid({**document, "surprise": 1})
    assert not validator.is_valid({**document, "schema_version": 2})


def test_twice_the_same_bytes(tiny_contents, tmp_path):
    assert bytes_of(write_bundle(tmp_path / "a", tiny_contents)) == bytes_of(
        write_bundle(tmp_path / "b", tiny_contents)
    )


def test_folders_files_and_arrays_are_copied(tiny_contents, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    np.save(source / "deep" / "noise.npy", np.arange(4.0))
    files = {**tiny_contents.files, "fixtures": source}
    bundle = write_bundle(tmp_path / "out", dataclasses.replace(tiny_contents, files=files))
    assert np.array_equal(np.load(bundle / "fixtures/deep/noise.npy"), np.arange(4.0))
    assert "fixtures/deep/noise.npy" in open_bundle(bundle).manifest.files
    assert not (bundle.stat().st_mode & 0o077) ^ (0o777 & ~_umask() & 0o077), "as readable as any folder one makes"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_bundle_is_replaced_and_nothing_is_left_beside_it(tiny_contents, tmp_path):
    out = tmp_path / "out"
    write_bundle(out, named(tiny_contents, "first"))
    write_bundle(out, named(tiny_contents, "second"))
    assert open_bundle(out).manifest.name == "second"
    assert names_in(tmp_path) == ["out"]


def test_a_bundle_is_replaced_where_folders_cannot_be_exchanged(tiny_contents, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_module, "_exchange", lambda a, b: False)
    out = tmp_path / "out"
    write_bundle(out, named(tiny_contents, "first"))
    write_bundle(out, named(tiny_contents, "second"))
    assert open_bundle(out).manifest.name == "second"
    assert names_in(tmp_path) == ["out"]


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tiny_contents, tmp_path):
    (tmp_path / "empty").mkdir()
    assert open_bundle(write_bundle(tmp_path / "empty", tiny_contents))
    assert open_bundle(write_bundle(tmp_path / "not" / "yet" / "there", tiny_contents))


def test_a_link_to_a_bundle_stays_a_link(tiny_contents, tmp_path):
    write_bundle(tmp_path / "real", named(tiny_contents, "first"))
    (tmp_path / "link").symlink_to("real")
    write_bundle(tmp_path / "link", named(tiny_contents, "second"))
    assert (tmp_path / "link").is_symlink()
    assert open_bundle(tmp_path / "real").manifest.name == "second"


@pytest.mark.parametrize("kind", ["file", "folder", "false_manifest", "own_file_inside", "link_inside"])
def test_what_is_no_bundle_or_more_than_one_is_not_touched(kind, tiny_contents, tmp_path):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind in ("own_file_inside", "link_inside"):
        write_bundle(out, tiny_contents)
        if kind == "link_inside":
            (out / "thesis").symlink_to("/etc/hostname")
        else:
            (out / "thesis.txt").write_text("precious")
    else:
        out.mkdir()
        (out / ("manifest.json" if kind == "false_manifest" else "thesis.txt")).write_text('{"name": "precious"}')
    before = names_in(tmp_path), bytes_of(tmp_path)
    with pytest.raises(UsageError, match="out") as caught:
        write_bundle(out, tiny_contents)
    assert "--output" in caught.value.hint
    assert (names_in(tmp_path), bytes_of(tmp_path)) == before


@pytest.mark.parametrize("where", ["/proc/edgegen/out", "file/out"])
def test_a_place_that_cannot_be_written_is_an_error(where, tiny_contents, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgegenError, match="cannot be written") as caught:
        write_bundle(tmp_path / where, tiny_contents)
    assert caught.value.exit_code == 1 and "--output" in caught.value.hint


def test_contents_that_make_no_bundle_leave_the_old_one(tiny_contents, tmp_path):
    out = write_bundle(tmp_path / "out", named(tiny_contents, "first"))
    for broken in (
        dataclasses.replace(tiny_contents, files={}),
        dataclasses.replace(tiny_contents, artifacts=tiny_contents.artifacts[:1]),
        dataclasses.replace(tiny_contents, artifacts=[*tiny_contents.artifacts, tiny_contents.artifacts[0]]),
        dataclasses.replace(tiny_contents, artifacts=[("onnx", tmp_path / "nowhere")]),
        dataclasses.replace(tiny_contents, files={**tiny_contents.files, "../escape": b""}),
        dataclasses.replace(tiny_contents, files={**tiny_contents.files, "reports/x": b""}),
    ):
        with pytest.raises(EdgegenError):
            write_bundle(out, broken)
        assert open_bundle(out).manifest.name == "first"
        assert names_in(tmp_path) == ["out"]


def test_a_link_among_the_sources_is_refused(tiny_contents, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "passwd").symlink_to("/etc/passwd")
    files = {**tiny_contents.files, "fixtures": source}
    with pytest.raises(EdgegenError, match="passwd"):
        write_bundle(tmp_path / "out", dataclasses.replace(tiny_contents, files=files))
    assert not (tmp_path / "out").exists()


def test_the_second_build_into_a_folder_is_told(tiny_contents, tmp_path):
    out = tmp_path / "out"
    with reserve(out) as first:
        with pytest.raises(EdgegenError, match="another build is writing"), reserve(out):
            pass
        other = write_bundle(tmp_path / "elsewhere", tiny_contents)
        first.write(tiny_contents)
    assert open_bundle(out) and open_bundle(other)
    write_bundle(out, tiny_contents)
    assert names_in(tmp_path) == ["elsewhere", "out"]


def test_many_threads_one_place(tiny_contents, tmp_path):
    """Whoever gets the lock writes; nobody breaks another's bundle, and no lock file stays behind."""
    out, refused, written = tmp_path / "out", [], []

    def build(name: str) -> None:
        for _ in range(4):
            try:
                write_bundle(out, named(tiny_contents, name))
                written.append(name)
            except EdgegenError as error:
                assert "another build" in error.message
                refused.append(name)

    threads = [threading.Thread(target=build, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) + len(refused) == 16 and written
    assert open_bundle(out).manifest.name in written
    assert names_in(tmp_path) == ["out"]


def _litter(tmp_path: Path, kind: str) -> Path:
    return tmp_path / f".out.edgegen-{kind}-0123456789abcdef"


def test_what_a_killed_build_left_is_removed_and_neighbours_are_not(tiny_contents, tmp_path):
    half = _litter(tmp_path, "new")
    half.mkdir()
    (half / "half").write_text("x")
    neighbours = [
        tmp_path / name for name in (".out.edgegen-new-mine", ".out2.edgegen-new-0123456789abcdef", "out.bak")
    ]
    for neighbour in neighbours:
        neighbour.mkdir()
    write_bundle(tmp_path / "out", tiny_contents)
    assert not half.exists() and all(neighbour.exists() for neighbour in neighbours)


def test_an_old_bundle_that_was_set_aside_comes_back(tiny_contents, tmp_path):
    """Killed between the two renames where folders cannot be exchanged: the next build restores, then replaces."""
    out = write_bundle(tmp_path / "out", named(tiny_contents, "first"))
    out.rename(_litter(tmp_path, "old"))
    with pytest.raises(RuntimeError, match="stop"), reserve(out):
        assert open_bundle(out).manifest.name == "first"
        raise RuntimeError("stop")
    assert open_bundle(out).manifest.name == "first"
    assert names_in(tmp_path) == ["out"]


BUILDER = """
import pickle, resource, signal, sys
from pathlib import Path
contents, out, limit = pickle.load(open(sys.argv[1], "rb")), Path(sys.argv[2]), int(sys.argv[3])
from edgegen.bundle.write import write_bundle
from edgegen.errors import EdgegenError
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
while True:
    try:
        write_bundle(out, contents)
    except EdgegenError as error:
        print(error.message); print(error.hint)
        sys.exit(error.exit_code)
"""


def _builder(tmp_path: Path, contents, out: Path, limit: int = 0) -> subprocess.Popen[str]:
    packed = tmp_path / "contents.pickle"
    packed.write_bytes(pickle.dumps(contents))
    root = Path(stage_module.__file__).parents[2]
    command = [sys.executable, "-c", BUILDER, str(packed), str(out), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)})


def test_a_file_too_large_for_the_disk_leaves_no_half_bundle(tiny_contents, tmp_path):
    """A real write failure: the kernel refuses bytes beyond a limit as it does on a full disk (EFBIG for ENOSPC)."""
    place = tmp_path / "place"
    old = write_bundle(place / "out", named(tiny_contents, "first"))
    builder = _builder(tmp_path, named(tiny_contents, "second"), old, limit=20_000)
    said, _ = builder.communicate(timeout=60)
    assert builder.returncode == 1 and "cannot be written whole" in said and "free some space" in said
    assert open_bundle(old).manifest.name == "first"
    assert names_in(place) == ["out"]


def test_killed_at_any_moment_the_old_or_the_new_bundle_is_there(tiny_contents, tmp_path):
    place, rng, names = tmp_path / "place", np.random.default_rng(0), ["first"]
    out = write_bundle(place / "out", named(tiny_contents, "first"))
    for turn in range(8):
        builder = _builder(tmp_path, named(tiny_contents, f"turn{turn}"), out)
        names.append(f"turn{turn}")
        assert builder.stdout is not None and builder.stdout.readline() == "ready\n"
        time.sleep(float(rng.uniform(0, 0.08)))
        builder.send_signal(signal.SIGKILL)
        builder.communicate()
        assert open_bundle(out).manifest.name in names
    write_bundle(out, tiny_contents)
    assert names_in(place) == ["out"]
