"""Builds whose Core ML components become functions of one package: the recipe, the join and its cache, the bundle."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgegen.build.graphs import Graphs
from edgegen.build.joining import join_components
from edgegen.build.lowering import LowerFailure, LowerJob, lower_all
from edgegen.build.pipeline import build_all
from edgegen.build.recipe import BuildOptions, resolve
from edgegen.bundle.manifest import stored_bytes
from edgegen.bundle.open import MANIFEST, open_bundle
from edgegen.bundle.run import generate
from edgegen.cache import Cache
from edgegen.cli.console import progress
from edgegen.cli.main import main
from edgegen.errors import EdgegenError, UsageError
from edgegen.inspect import inspect_bundle
from edgegen.lower.backend import get_backend
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.registry import parse
from edgegen.targets import load_target
from edgegen.targets.read import TargetFileError, data_folder
from edgegen.verify.bundle import raise_unless_met, verify_bundle
from edgegen.verify.outcome import Outcome, Unavailable
from edgegen.verify.parity import load_executables
from edgegen.verify.trajectory import Signature

JOINER = b"edgegen.lower.coreml_functions"
PACKAGE = "components/coreml/model.mlpackage"
FUNCTIONS = {"text_encoder": "encode", "denoiser": "denoise", "decoder": "decode"}


def recipe_for(student, target, output, **options):
    return resolve(student, load_target(target), BuildOptions(backends=("coreml",), **options), output)


def kill_our_joiner(killed, until):
    """End the child of this process that joins, as soon as it is there."""
    while time.monotonic() < until and not killed:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
                if ours and JOINER in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
                    killed.append(int(folder.name))
            except OSError:  # it ended while we looked
                continue
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    """Components lowered into a cache, and a join of them whose process was killed."""
    folder = tmp_path_factory.mktemp("one")
    recipe = recipe_for(tiny, "iphone16pro", folder / "phone", precision="fp32", one_package=True)
    (backend,) = recipe.backends
    jobs = [
        LowerJob(
            tiny.components[name],
            backend.name,
            backend.precision,
            backend.lowering_options,
            Pipeline(parse(", ".join(recipe.canonical[name]))),
            Pipeline(parse(", ".join(backend.passes))),
        )
        for name in recipe.components
    ]
    cache = Cache(folder / "cache")
    (folder / "logs").mkdir()
    lowered = lower_all(jobs, Graphs(), cache, folder / "logs", lambda job: None)
    ended: list[int] = []
    watcher = threading.Thread(target=kill_our_joiner, args=(ended, time.monotonic() + 120))
    watcher.start()
    results = join_components(backend, lowered, cache, folder / "logs")
    watcher.join()
    entries = sorted(path.name for path in (folder / "cache").glob("*/entries/*"))
    return SimpleNamespace(folder=folder, lowered=lowered, results=results, ended=ended, entries=entries)


@pytest.fixture(scope="module")
def built(tiny, killed):
    """The build after it, with the same cache."""
    cache = Cache(killed.folder / "cache")
    recipe = recipe_for(tiny, "iphone16pro", killed.folder / "phone", precision="fp32", one_package=True)
    with progress(quiet=True) as silent:
        (done,) = build_all(tiny, [recipe], cache, silent)
    return done, cache.statistics


def test_a_killed_join_leaves_nothing_half_made(killed):
    assert len(killed.ended) == 1
    *rest, failure = killed.results
    assert rest == killed.lowered, "what was lowered is kept as it is"
    assert isinstance(failure, LowerFailure) and "one package for backend `coreml`" in failure.error.message
    assert failure.log.name == "coreml-join.log"
    assert len(killed.entries) == 3 and all(name.startswith("lower-") for name in killed.entries)
    assert not list((killed.folder / "cache").glob("*/building/*"))


def test_the_next_build_joins_what_was_lowered(built):
    done, statistics = built
    # What was lowered is found; the reference, the package and its verification are made.
    assert done.passed and (statistics.built, statistics.hits) == (3, 3)


def test_the_bundle_has_one_package_that_counts_once(built):
    done, _ = built
    bundle = open_bundle(done.path)
    artifacts = bundle.artifacts("coreml")
    assert {name: one.function for name, one in artifacts.items()} == FUNCTIONS
    assert {one.path for one in artifacts.values()} == {PACKAGE}
    on_disk = sum(path.stat().st_size for path in (done.path / PACKAGE).rglob("*") if path.is_file())
    assert stored_bytes(artifacts.values()) == done.summary()["backends"]["coreml"]["bytes"] == on_disk
    assert [p.name for p in (done.path / "components" / "coreml").iterdir()] == ["model.mlpackage"]
    assert bundle.manifest.options["backend.coreml.package"] == "one"
    assert all(one.executed for one in artifacts.values())
    assert (done.path / "reports/logs/coreml-join.log").is_file()
    assert "function <code>decode</code>" in (done.path / "report.html").read_text()


def test_it_is_inspected_verified_and_drawn_with(built, capsys):
    done, _ = built
    found = inspect_bundle(done.path)
    assert {one.component: one.function for one in found.artifacts} == FUNCTIONS
    assert main(["inspect", str(done.path)]) == 0
    assert f"coreml fp32: function `decode` of {PACKAGE} with " in capsys.readouterr().out
    _, reports = verify_bundle(done.path)
    raise_unless_met(done.path, reports)
    assert min(part.sqnr_db for part in reports[0].components) >= 60
    assert generate(open_bundle(done.path), "a small red circle", 0).image.shape == (16, 16, 3)


def test_a_function_that_is_not_there_is_named(built, tmp_path):
    root = tmp_path / "phone"
    shutil.copytree(built[0].path, root)
    document = json.loads((root / MANIFEST).read_text())
    next(one for one in document["artifacts"] if one["component"] == "decoder")["function"] = "enlarge"
    (root / MANIFEST).write_text(json.dumps(document))
    message = "`model.mlpackage` has no function `enlarge`, it has `encode`, `denoise`, `decode`"
    with pytest.raises(EdgegenError, match=message):
        generate(open_bundle(root), "a small red circle", 0)
    bundle = open_bundle(root)
    artifacts = {name: bundle.loadable(one) for name, one in bundle.artifacts("coreml").items()}
    signatures = {name: Signature(io.inputs, io.outputs) for name, io in bundle.manifest.components.items()}
    loaded = load_executables(get_backend("coreml"), artifacts, signatures)
    assert loaded["decoder"].outcome is Outcome.LOAD_FAIL and message in loaded["decoder"].reason
    assert not isinstance(loaded["denoiser"], Unavailable)


def test_the_recipe_says_what_will_be_joined(tiny, tmp_path):
    one = recipe_for(tiny, "iphone17", tmp_path, one_package=True).backends[0]
    assert one.functions == FUNCTIONS and one.options["package"] == "one" and "package" not in one.lowering_options
    each = recipe_for(tiny, "iphone17", tmp_path, one_package=False).backends[0]
    assert each.functions == {} and each.lowering_options == one.lowering_options


def test_dry_run_shows_the_join(capsys, checkpoint):
    assert main(["build", "--target", "iphone16pro", "--one-package", "--dry-run", str(checkpoint)]) == 0
    said = capsys.readouterr().out
    assert "join     coreml: one package with `encode` (text_encoder), `denoise` (denoiser), `decode` (decoder)" in said


def test_systems_that_know_one_function_a_package_are_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match=r"`iphone15` cannot have one package.*iOS17") as caught:
        recipe_for(tiny, "iphone15", tmp_path, one_package=True)
    assert "without `--one-package`" in caught.value.hint
    with pytest.raises(UsageError, match="makes nothing with `coreml`"):
        resolve(tiny, load_target("linux-x86"), BuildOptions(one_package=True), tmp_path)


def test_a_target_file_may_ask_for_it(tmp_path):
    text = (data_folder() / "iphone16pro.toml").read_text()
    option = 'options = { minimum_deployment_target = "iOS18" }'
    assert option in text
    path = tmp_path / "iphone16pro.toml"
    path.write_text(text.replace(option, option.replace(" }", ', package = "one" }')))
    assert load_target(path).backend("coreml").options["package"] == "one"
    path.write_text(text.replace(option, 'options = { minimum_deployment_target = "iOS17", package = "one" }'))
    with pytest.raises(TargetFileError, match="package cannot be one before minimum_deployment_target iOS18"):
        load_target(path)
    path.write_text(text.replace(option, option.replace(" }", ', package = "all" }')))
    with pytest.raises(TargetFileError, match="option package cannot be all: choose from components, one"):
        load_target(path)
