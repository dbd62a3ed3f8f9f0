import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from edgegen.cache import FORMAT, INDEX, Cache, Held, default_root, is_whole, recorded_files
from edgegen.errors import EdgegenError


@pytest.fixture
def cache(tmp_path):
    made = Cache(tmp_path / "cache")
    yield made
    made.close()


def write(text):
    def build(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "file.txt").write_text(text)
        (folder / "empty").mkdir()

    return build


def never(folder):
    raise AssertionError("a whole entry was built again")


def script(code: str, *args: object, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def leftovers(cache: Cache) -> list[str]:
    home = cache.root / FORMAT
    return [path.name for part in ("building", "locks") for path in (home / part).iterdir()]


def test_same_parts_same_key_and_every_part_counts(cache):
    key = cache.key("lower", a=1, b={"x": [1, 2], "y": None})
    assert key == cache.key("lower", b={"y": None, "x": (1, 2)}, a=1)
    others = [
        cache.key("capture", a=1, b={"x": [1, 2], "y": None}),
        cache.key("lower", a="1", b={"x": [1, 2], "y": None}),
        cache.key("lower", a=True, b={"x": [1, 2], "y": None}),
        cache.key("lower", a=1, b={"x": [2, 1], "y": None}),
        cache.key("lower", a=1, b={"x": [1, 2]}, y=None),
    ]
    assert len({key, *others}) == len(others) + 1


@pytest.mark.parametrize("value", [Path("model.pt"), {1: "x"}, b"bytes", {"a", "b"}])
def test_a_part_that_is_no_json_value_is_refused(cache, value):
    with pytest.raises(TypeError):
        cache.key("lower", part=value)


@pytest.mark.parametrize("stage", ["", "../x", "Lower", "a/b", "a--b"])
def test_a_stage_that_is_no_name_is_refused(cache, stage):
    with pytest.raises(ValueError, match="stage"):
        cache.key(stage)


@pytest.mark.parametrize("key", ["../../etc", "lower-123", "lower-" + "A" * 64, "lower-" + "a" * 64 + "/.."])
def test_a_key_that_could_leave_the_cache_is_refused(cache, key):
    with pytest.raises(ValueError, match="not a key"):
        cache.directory(key, write("x"))
    assert not cache.root.exists()


def test_second_call_is_a_hit_also_for_another_object(cache, tmp_path):
    key = cache.key("lower", a=1)
    entry = cache.directory(key, write("made"))
    assert (entry / "sub" / "file.txt").read_text() == "made"
    other = Cache(tmp_path / "cache")
    assert cache.directory(key, never) == other.directory(key, never) == entry
    assert (cache.statistics.built, cache.statistics.hits, other.statistics.hits) == (1, 1, 1)
    assert leftovers(cache) == []
    other.close()


def test_find_gives_what_is_whole_and_makes_nothing(cache):
    key = cache.key("lower", a=1)
    assert cache.find(key) is None
    entry = cache.directory(key, write("text"))
    assert cache.find(key) == entry
    assert recorded_files(entry).keys() == {entry / "sub" / "file.txt"}
    (entry / "sub" / "file.txt").write_text("other")
    assert cache.find(key) is None
    with pytest.raises(ValueError, match="is not a key"):
        cache.find("../key")


def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(cache):
    key = cache.key("lower", a=1)

    def fails(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("converter")

    with pytest.raises(RuntimeError, match="converter"):
        cache.directory(key, fails)
    assert leftovers(cache) == []
    assert cache.size() == Held(0, 0)
    assert (cache.directory(key, write("second")) / "sub" / "file.txt").read_text() == "second"


def test_what_the_build_cannot_open_is_not_blamed_on_the_cache(cache):
    with pytest.raises(FileNotFoundError):
        cache.directory(cache.key("lower", a=1), lambda folder: (folder / "absent").read_bytes() and None)
    assert leftovers(cache) == []


def test_a_link_in_an_entry_is_refused(cache):
    def links(folder):
        (folder / "out").symlink_to("/etc/hostname")

    with pytest.raises(EdgegenError, match="neither file nor folder"):
        cache.directory(cache.key("lower", a=1), links)
    assert cache.size().entries == 0


def flip(entry):
    path = entry / "sub" / "file.txt"
    path.write_text(path.read_text().swapcase())


def add(entry):
    (entry / "more").write_text("x")


def to_link(entry):
    path = entry / "sub" / "file.txt"
    path.rename(entry.parent / "elsewhere")
    path.symlink_to(entry.parent / "elsewhere")


DAMAGES = {
    "flipped": flip,
    "truncated": lambda entry: os.truncate(entry / "sub" / "file.txt", 1),
    "file gone": lambda entry: (entry / "sub" / "file.txt").unlink(),
    "folder gone": lambda entry: (entry / "empty").rmdir(),
    "file more": add,
    "file became a link": to_link,
    "index gone": lambda entry: (entry / INDEX).unlink(),
    "index empty": lambda entry: (entry / INDEX).write_text(""),
    "index of another": lambda entry: (entry / INDEX).write_text(json.dumps({"key": "x", "files": {}})),
    "index not text": lambda entry: (entry / INDEX).write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_entry_is_made_again(cache, damage):
    key = cache.key("lower", a=1)
    entry = cache.directory(key, write("good"))
    damage(entry)
    assert not is_whole(entry, key)
    assert (cache.directory(key, write("good")) / "sub" / "file.txt").read_text() == "good"
    assert cache.statistics.repaired == 1
    assert leftovers(cache) == []
    cache.directory(key, never)


def test_an_entry_under_another_key_is_not_taken_for_it(cache):
    first, second = cache.key("lower", a=1), cache.key("lower", a=2)
    entry = cache.directory(first, write("one"))
    entry.rename(entry.parent / second)
    assert (cache.directory(second, write("two")) / "sub" / "file.txt").read_text() == "two"


def test_threads_of_one_process_build_a_key_once(cache):
    key = cache.key("lower", a=1)
    built = []

    def build(folder):
        time.sleep(0.1)
        built.append(folder)
        write("x")(folder)

    threads = [threading.Thread(target=cache.directory, args=(key, build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (cache.statistics.built, cache.statistics.hits) == (1, 7)


RACER = """
    import sys, time
    from pathlib import Path
    from edgegen.cache import Cache
    root, log, start = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    def build(folder):
        with log.open("a") as stream:
            stream.write("built\\n")
        time.sleep(0.2)
        (folder / "data").write_bytes(bytes(100_000))
    cache = Cache(root)
    time.sleep(max(0.0, start - time.time()))
    for part in range(5):
        entry = cache.directory(cache.key("lower", part=part), build)
        assert (entry / "data").stat().st_size == 100_000
    print(cache.statistics.built, cache.statistics.hits)
"""


def test_processes_share_a_cache_and_build_each_key_once(cache, tmp_path):
    log = tmp_path / "log"
    racers = [script(RACER, cache.root, log, time.time() + 1) for _ in range(4)]
    results = []
    for racer in racers:
        out, err = racer.communicate(timeout=60)
        assert racer.returncode == 0, err
        results.append([int(number) for number in out.split()])
    assert log.read_text().splitlines() == ["built"] * 5
    assert sum(built for built, _ in results) == 5
    assert sum(hits for _, hits in results) == 15
    assert leftovers(cache) == []


KILLED = """
    import sys, time
    from pathlib import Path
    from edgegen.cache import Cache
    def build(folder):
        (folder / "half").write_bytes(bytes(50_000))
        print("building", flush=True)
        time.sleep(60)
    cache = Cache(Path(sys.argv[1]))
    cache.directory(cache.key("lower", a=1), build)
"""


def kill_a_builder(cache):
    builder = script(KILLED, cache.root)
    assert builder.stdout.readline() == "building\n"
    builder.send_signal(signal.SIGKILL)
    builder.communicate(timeout=30)


def test_kill_9_leaves_litter_that_the_next_build_of_the_key_removes(cache):
    kill_a_builder(cache)
    assert len(leftovers(cache)) == 2
    assert cache.size().entries == 0
    assert cache.size().bytes >= 50_000
    entry = cache.directory(cache.key("lower", a=1), write("again"))
    assert not (entry / "half").exists()
    assert leftovers(cache) == []


def test_clean_removes_entries_and_litter_and_says_how_much(cache):
    kill_a_builder(cache)
    cache.directory(cache.key("lower", b=1), write("x" * 1000))
    before = cache.size()
    assert cache.clean() == before
    assert before.entries == 1
    assert before.bytes > 51_000
    assert cache.size() == Held(0, 0)
    assert (cache.directory(cache.key("lower", b=1), write("new")) / "sub" / "file.txt").read_text() == "new"


def test_clean_of_a_cache_that_was_never_used_makes_nothing(cache):
    assert cache.clean() == Held(0, 0)
    assert not cache.root.exists()


def test_clean_leaves_what_is_not_its_own(tmp_path):
    root = tmp_path / "home"
    (root / "entries").mkdir(parents=True)
    (root / "entries" / "thesis.txt").write_text("mine")
    cache = Cache(root)
    cache.directory(cache.key("lower", a=1), write("x"))
    cache.clean()
    assert (root / "entries" / "thesis.txt").read_text() == "mine"


def test_clean_is_refused_while_a_build_uses_the_cache(cache, tmp_path):
    entry = cache.directory(cache.key("lower", a=1), write("in use"))
    other = Cache(cache.root)
    with pytest.raises(EdgegenError, match="in use by another build") as caught:
        other.clean()
    assert caught.value.hint is not None
    assert "edgegen cache clean" in caught.value.hint
    assert (entry / "sub" / "file.txt").exists()
    cache.close()
    assert other.clean().entries == 1


def test_a_root_that_is_a_file_is_explained(tmp_path):
    (tmp_path / "file").write_text("x")
    cache = Cache(tmp_path / "file" / "cache")
    with pytest.raises(EdgegenError, match="cannot be used: Not a directory") as caught:
        cache.directory(cache.key("lower", a=1), write("x"))
    assert "EDGEGEN_CACHE_DIR" in (caught.value.hint or "")


def test_a_root_that_cannot_be_written_is_explained():
    cache = Cache(Path("/proc/1/edgegen"))  # the kernel refuses this to root as well
    with pytest.raises(EdgegenError, match="cannot be used"):
        cache.directory(cache.key("lower", a=1), write("x"))


FULL = """
    import resource, sys
    from pathlib import Path
    from edgegen.cache import Cache
    from edgegen.errors import EdgegenError
    cache = Cache(Path(sys.argv[1]))
    kept = cache.directory(cache.key("lower", kept=1), lambda folder: (folder / "a").write_text("a") and None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        cache.directory(cache.key("lower", a=1), lambda folder: (folder / "big").write_bytes(bytes(100_000)) and None)
    except EdgegenError as error:
        print(error.message, error.hint, sep="|")
    assert (kept / "a").read_text() == "a"
"""


def test_a_file_that_does_not_fit_leaves_no_entry_and_names_the_way_out(cache):
    child = script(FULL, cache.root)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0, err
    assert f"cache `{cache.root}` cannot hold more: {os.strerror(errno.EFBIG)}|" in out
    assert "edgegen cache clean" in out
    assert leftovers(cache) == []
    assert cache.size().entries == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB; skipped where this user may not mount one."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_leaves_no_entry_and_frees_what_it_took(small_disk):
    cache = Cache(small_disk / "cache")
    kept = cache.directory(cache.key("lower", kept=1), write("kept"))
    with pytest.raises(EdgegenError, match="No space left on device") as caught:
        cache.directory(cache.key("lower", a=1), lambda folder: (folder / "big").write_bytes(bytes(2**21)) and None)
    assert "EDGEGEN_CACHE_DIR" in (caught.value.hint or "")
    assert leftovers(cache) == []
    assert (kept / "sub" / "file.txt").read_text() == "kept"
    cache.directory(cache.key("lower", b=1), write("fits"))
    cache.close()


def test_root_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEGEN_CACHE_DIR", str(tmp_path / "here"))
    assert Cache().root == tmp_path / "here"
    monkeypatch.setenv("EDGEGEN_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert default_root() == tmp_path / "xdg" / "edgegen"
    assert default_root().name == "edgegen"


def test_backup_tools_are_told_that_it_is_a_cache(cache):
    cache.directory(cache.key("lower", a=1), write("x"))
    assert (cache.root / FORMAT / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
