"""Bundles that the whole suite shares: lowered once, in one cache."""

import pytest

from edgegen.cli.main import main


@pytest.fixture(scope="session")
def build_cache(tmp_path_factory):
    """Every build of this session uses this cache, in this process and in its children."""
    folder = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setenv("EDGEGEN_CACHE_DIR", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The shipped student as `edgegen student pack` writes it."""
    path = tmp_path_factory.mktemp("student") / "model.pt"
    assert main(["student", "pack", "--output", str(path), "-q"]) == 0
    return path


@pytest.fixture(scope="session")
def bundle(build_cache, checkpoint, tmp_path_factory):
    """A small, quick bundle that this machine executes: ONNX, fp32."""
    path = tmp_path_factory.mktemp("bundles") / "linux"
    assert main(["build", "--target", "linux-x86", "--output", str(path), str(checkpoint), "-q"]) == 0
    return path


@pytest.fixture(scope="session")
def everything(build_cache, checkpoint, tmp_path_factory):
    """All five backends, each at the precision that its target prefers."""
    path = tmp_path_factory.mktemp("bundles") / "iphone17"
    arguments = ["build", "--target", "iphone17", "--backend", "all", "--output", str(path), str(checkpoint), "-q"]
    assert main(arguments) == 0
    return path
