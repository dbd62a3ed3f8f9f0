"""Target files that somebody else wrote: every one ends in a message that names file and key."""

import os
import threading

import pytest

from edgegen.errors import EdgegenError, UsageError
from edgegen.targets import list_targets, load_target
from edgegen.targets.read import SIZE_LIMIT, TargetFileError, data_folder


@pytest.fixture
def iphone(tmp_path):
    """A function that writes iphone15's file with a replacement made, and returns its path."""

    def write(old: str = "", new: str = ""):
        text = (data_folder() / "iphone15.toml").read_text()
        assert old in text
        path = tmp_path / "mine.toml"
        path.write_text(text.replace(old, new, 1) if old else text)
        return path

    return write


def problems(path):
    with pytest.raises(TargetFileError) as caught:
        load_target(path)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)
    return [problem.removeprefix(str(path)) for problem in caught.value.problems]


def test_a_file_of_ones_own_is_a_target(iphone):
    target = load_target(iphone('name = "iphone15"', 'name = "my-phone"'))
    assert target.name == "my-phone"
    assert target.chipset.name == "a16"
    assert load_target(str(iphone())).name == "iphone15"


def test_chipset_beside_the_file_comes_first(iphone, tmp_path):
    (tmp_path / "chipsets").mkdir()
    text = (data_folder() / "chipsets" / "a16.toml").read_text()
    (tmp_path / "chipsets" / "a16.toml").write_text(text.replace("A16 Bionic", "A16 of ours"))
    assert load_target(iphone()).chipset.title == "A16 of ours"
    (tmp_path / "chipsets" / "a16.toml").write_text(text.replace('name = "a16"', 'name = "a15"'))
    with pytest.raises(TargetFileError, match="the file is called `a16`"):
        load_target(iphone())


@pytest.mark.parametrize("typed", ["iphnoe15", "iphone-15", "IPHONE15", "iphone5"])
def test_an_unknown_name_is_answered_with_near_ones(typed):
    with pytest.raises(UsageError, match=r"nearest: .*`iphone15`") as caught:
        load_target(typed)
    assert caught.value.hint == "edgegen targets list"


@pytest.mark.parametrize("typed", ["zzzzzz", "", " ", "chipsets", "..", "\x00", "a" * 100_000])
def test_a_name_like_nothing_is_refused(typed):
    with pytest.raises(UsageError, match="is unknown"):
        load_target(typed)


CHANGES = [
    ('chipset = "a16"', 'chipset = "../../../etc/passwd"', ":chipset: string should match pattern"),
    ('chipset = "a16"', 'chipset = "/etc/passwd"', ":chipset: string should match pattern"),
    ('chipset = "a16"', 'chipset = "a61"', ":chipset: `a61` is unknown; nearest: "),
    ('chipset = "a16"', "chipset = 16", ":chipset: input should be a valid string"),
    ('name = "iphone15"', 'name = "../iphone15"', ":name: string should match pattern"),
    ('name = "iphone15"', "", ":name: is missing"),
    ('name = "iphone15"', 'name = "iphone15"\ncolour = "blue"', ":colour: unknown key"),
    ("memory_bytes = 6_442_450_944", "memory_bytes = 6.0", ":memory_bytes: input should be a valid integer"),
    ("memory_bytes = 6_442_450_944", "memory_bytes = true", ":memory_bytes: input should be a valid integer"),
    ("memory_bytes = 6_442_450_944", "memory_bytes = 1979-05-27", ":memory_bytes: input should be a valid integer"),
    ("memory_bytes = 6_442_450_944", "memory_bytes = -1", ":memory_bytes: input should be greater"),
    ("bytes = 3_221_225_472", "bytes = 9_000_000_000", ":(file): app_memory.bytes is more than memory_bytes"),
    ('floor = "17.0"', 'floor = "soon"', ":os.floor: string should match pattern"),
    ('delegates = ["neural-engine"]', "delegates = []", ":runtimes[0].delegates: tuple should have at least 1"),
    ('delegates = ["neural-engine"]', 'delegates = ["x", "y"]', ":runtimes[0].delegates[0]: `x` is unknown"),
    (
        'delegates = ["neural-engine"]',
        'delegates = ["core-ai"]',
        ":runtimes[0].delegates[0]: `core-ai` is a delegate of coreai, not of coreml",
    ),
    ('"w6", "w4"', '"w6", "w5"', ":runtimes[0].precisions[4]: input should be"),
    ('"w6", "w4"', '"w6", "w6"', ":runtimes[0]: a precision is listed twice"),
    ('"fp16", "w8", "w6"', '"w8", "w6"', ":runtimes[0]: default_precision fp16 is not among precisions"),
    ('default_precision = "fp16"', 'default_precision = "w8"', ":runtimes[0].default_precision: input should be"),
    ('"iOS17" }', '"iOS3" }', ":runtimes[0]: option minimum_deployment_target cannot be iOS3: choose from iOS16"),
    ('"iOS17" }', '"iOS17", opset = "20" }', ":runtimes[0]: option opset is unknown to coreml"),
    ('backend = "executorch"', 'backend = "coreml"', ":(file): backend coreml is listed twice"),
    ('backend = "coreai"', 'backend = "onnx"', ":(file): backend onnx is listed twice, or both offered and denied"),
    ('reference = "', 'whatever = "', ":denied_backends[0].reference: is missing"),
    ('stored_only = ["fp16"]', 'stored_only = ["w8"]', ":runtimes[2]: stored_only names w8"),
]


@pytest.mark.parametrize(("old", "new", "message"), CHANGES)
def test_what_is_wrong_is_named_with_file_and_key(iphone, old, new, message):
    assert any(problem.startswith(message) for problem in problems(iphone(old, new)))


def test_all_problems_are_told_at_once(iphone):
    path = iphone('floor = "17.0"', 'floor = "soon"')
    path.write_text(path.read_text().replace('title = "iPhone 15"', "title = 15"))
    assert len(problems(path)) == 2


HOSTILE = {
    "empty": b"",
    "no toml": b"{]",
    "not text": b"\xff\xfe\x00",
    "NUL": b'name = "\x00"',
    "nested without end": b"a = " + b"[" * 100_000,
    "nested tables": b"[" + b"a." * 5_000 + b"a]",
    "huge number": b"memory_bytes = " + b"9" * 10_000,
    "key twice": b'name = "a"\nname = "b"',
    "too large": b"#" * (SIZE_LIMIT + 1),
    "an array": b'runtimes = "x"\nos = []\napp_memory = 3',
    "infinity": b"memory_bytes = inf",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_content_is_a_message(tmp_path, content):
    path = tmp_path / "hostile.toml"
    path.write_bytes(content)
    assert problems(path)


def test_what_is_no_file_is_a_message(tmp_path):
    assert problems(tmp_path) == [": is not a regular file"] or problems(tmp_path) == [": Is a directory"]
    assert problems(tmp_path / "absent.toml") == [": No such file or directory"]
    fifo = tmp_path / "fifo.toml"
    os.mkfifo(fifo)
    asked = threading.Thread(target=lambda: problems(fifo), daemon=True)
    asked.start()
    asked.join(10)
    assert not asked.is_alive(), "reading a FIFO without a writer waits for ever"
    with pytest.raises(EdgegenError):
        load_target("/dev/zero/x.toml")
    with pytest.raises(EdgegenError, match="not a regular file"):
        load_target("/dev/zero")


def test_names_are_sorted_and_folders_are_not_devices():
    names = list_targets()
    assert list(names) == sorted(names)
    assert "chipsets" not in names
