import json
from pathlib import Path

import pytest

from edgegen.cache import Cache
from edgegen.cli.main import main


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEGEN_CACHE_DIR", str(tmp_path / "cache"))
    cache = Cache()
    cache.directory(cache.key("lower", a=1), lambda folder: (folder / "a").write_bytes(bytes(5000)) and None)
    cache.close()
    return tmp_path / "cache"


def test_dir_prints_the_folder_and_nothing_else_on_stdout(root, capsys):
    assert main(["cache", "dir"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{root}\n"
    assert captured.err.startswith("1 entries, ")
    assert main(["cache", "dir", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_clean_says_what_it_freed(root, capsys):
    held = Cache().size()
    assert main(["cache", "clean", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"dir": str(root), "entries": 1, "bytes": held.bytes}
    assert held.bytes > 5000
    assert main(["cache", "clean"]) == 0
    assert capsys.readouterr().out == "freed 0 bytes (0 B) in 0 entries\n"


def test_clean_while_in_use_fails_and_loses_nothing(root, capsys):
    cache = Cache()
    entry = cache.directory(cache.key("lower", a=1), lambda folder: None)
    assert main(["cache", "clean"]) == 1
    assert "in use by another build" in capsys.readouterr().err
    assert (Path(entry) / "a").stat().st_size == 5000
    cache.close()
