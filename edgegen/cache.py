"""Stages cached by content: an entry is named by a hash of everything that decides it, and is whole or not there.

Layout, under the cache's root: `edgegen-cache-v1/entries/<key>/` are the entries, each with an index of its own files;
`building/<key>.<random>/` is where one is made before it is renamed into place; `unfinished/<key>/` is what a long
build wants to find again after it was killed, gone when the entry is there; `locks/` holds one file lock a key
while that key is being made, so that a second builder waits for the first instead of doing the work twice;
`in-use.lock` is held shared by everyone who uses the cache and exclusively by `clean`. A lock dies with its process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgegen.errors import EdgegenError

FORMAT = "edgegen-cache-v1"
INDEX = ".index.json"
ENVIRONMENT = "EDGEGEN_CACHE_DIR"
_KEY = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{64}")
_STAGE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# https://bford.info/cachedir/
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# This folder is a cache made by edgegen; it can be deleted.\n"


class Held(NamedTuple):
    """What a cache holds, or what `clean` gave back."""

    entries: int
    bytes: int


@dataclass
class Statistics:
    """What one `Cache` object did: `repaired` counts entries that were damaged and made again."""

    hits: int = 0
    built: int = 0
    repaired: int = 0


def default_root() -> Path:
    """`EDGEGEN_CACHE_DIR`, or the user's cache folder as the platform has it."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).absolute()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("edgegen", appauthor=False))


class _BuildFailed(Exception):
    """An OSError of the build's own, which the cache has nothing to say about."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class Cache:
    """A folder of immutable entries that any number of processes and threads may share. `root` None: `default_root`."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root.absolute() if root is not None else default_root()
        self.statistics = Statistics()
        self._home = self.root / FORMAT
        self._guard = threading.Lock()
        self._in_use: int | None = None

    def key(self, stage: str, **parts: Any) -> str:
        """`<stage>-<sha256>` over `parts`: JSON values only (tuples count as lists); equal parts make equal keys.

        TypeError for anything else, a path above all: what a file holds decides an entry, not where it lies.
        """
        if not _STAGE.fullmatch(stage):
            raise ValueError(f"stage {stage!r} is not lower-case words joined by dashes")
        text = json.dumps([FORMAT, stage, _plain(parts)], sort_keys=True, allow_nan=False, separators=(",", ":"))
        return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()}"

    def directory(self, key: str, build: Callable[[Path], None]) -> Path:
        """The entry of `key`, made by `build(folder)` when it is not there or damaged.

        `build` fills an empty folder with files and folders (no links); when it raises, no entry exists afterwards. The
        result is read-only by agreement: copy out of it. EdgegenError when the cache cannot be written.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a key made by Cache.key")
        try:
            with self._explained():
                return self._directory(key, build)
        except _BuildFailed as failed:
            raise failed.error from failed.error.__cause__

    def find(self, key: str) -> Path | None:
        """The entry of `key` where it is there and whole; nothing is made."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a key made by Cache.key")
        with self._explained():
            self._use()
            entry = self._home / "entries" / key
            return self._hit(entry) if is_whole(entry, key) else None

    def has(self, key: str) -> bool:
        """Whether there is an entry of `key`, whole or not: nothing of it is read."""
        return bool(_KEY.fullmatch(key)) and (self._home / "entries" / key).is_dir()

    def unfinished(self, key: str) -> Path:
        """A folder for the state of a long build of `key`, to be asked for inside that build alone: it outlives a
        killed process, and goes when the entry is there."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a key made by Cache.key")
        with self._explained():
            folder = self._home / "unfinished" / key
            folder.mkdir(parents=True, exist_ok=True)
            return folder

    def size(self) -> Held:
        """Entries and bytes on disk, litter of killed builds included."""
        entries = self._home / "entries"
        count = sum(1 for _ in entries.iterdir()) if entries.is_dir() else 0
        return Held(count, sum(_bytes(self._home / part) for part in ("entries", "building", "unfinished")))

    def clean(self) -> Held:
        """Delete every entry and all litter; EdgegenError while another process uses the cache."""
        if not self._home.is_dir():
            return Held(0, 0)
        self.close()
        with self._explained():
            lock = os.open(self._home / "in-use.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = self.size()
                for part in ("entries", "building", "unfinished", "locks"):
                    if (self._home / part).exists():
                        shutil.rmtree(self._home / part)
            except BlockingIOError as error:
                raise EdgegenError(
                    f"cache `{self.root}` is in use by another build",
                    hint="`edgegen cache clean` again when it has ended",
                ) from error
            finally:
                os.close(lock)
        return held

    def close(self) -> None:
        """Let go of the cache, so that `clean` may run; the next `directory` takes it again."""
        with self._guard:
            if self._in_use is not None:
                os.close(self._in_use)
                self._in_use = None

    def __del__(self) -> None:
        self.close()

    def _directory(self, key: str, build: Callable[[Path], None]) -> Path:
        self._use()
        entry = self._home / "entries" / key
        if is_whole(entry, key):
            return self._hit(entry)
        with self._locked(key):
            if is_whole(entry, key):  # whoever held the lock before us made it
                return self._hit(entry)
            self._sweep(key)
            damaged = entry.exists()
            if damaged:
                self._discard(entry, key)
            self._make(entry, key, build)
            with self._guard:
                self.statistics.built += 1
                self.statistics.repaired += damaged
        return entry

    def _hit(self, entry: Path) -> Path:
        with self._guard:
            self.statistics.hits += 1
        return entry

    def _use(self) -> None:
        """Hold `in-use.lock` shared for as long as this object lives: entries that it returned are not cleaned away."""
        with self._guard:
            if self._in_use is None:
                self._home.mkdir(parents=True, exist_ok=True)
                (self._home / "CACHEDIR.TAG").write_text(_TAG)
                lock = os.open(self._home / "in-use.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    _flock(lock, fcntl.LOCK_SH)
                except BaseException:
                    os.close(lock)
                    raise
                self._in_use = lock
            for part in ("entries", "building", "locks"):
                (self._home / part).mkdir(exist_ok=True)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Only one builder a key, over threads and processes; the file goes when its last holder does."""
        path = self._home / "locks" / key
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _flock(lock, fcntl.LOCK_EX)
                if _same_file(lock, path):  # else its holder unlinked it while we waited: take the new one
                    break
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(lock)

    def _sweep(self, key: str) -> None:
        """We hold the lock of `key`, so whatever is still being made for it belongs to a process that was killed."""
        for litter in (self._home / "building").glob(f"{key}.*"):
            shutil.rmtree(litter)

    def _discard(self, entry: Path, key: str) -> None:
        aside = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self._home / "building"))
        entry.rename(aside / "damaged")
        shutil.rmtree(aside)

    def _make(self, entry: Path, key: str, build: Callable[[Path], None]) -> None:
        folder = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self._home / "building"))
        try:
            try:
                build(folder)
            except OSError as error:
                if error.errno in _FULL:
                    raise
                raise _BuildFailed(error) from error
            index = {"key": key, "files": _contents(folder)}
            (folder / INDEX).write_text(json.dumps(index, sort_keys=True))
            _sync(folder)
            folder.rename(entry)
            _sync_folder(entry.parent)
            shutil.rmtree(self._home / "unfinished" / key, ignore_errors=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the file system refuses, as an error that names the cache."""
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in _FULL:
                raise EdgegenError(
                    f"cache `{self.root}` cannot hold more: {error.strerror}",
                    hint=f"`edgegen cache clean`, or set `{ENVIRONMENT}` to a folder on a disk with room",
                ) from error
            if self._concerns_cache(error):
                raise EdgegenError(
                    f"cache `{self.root}` cannot be used: {error.strerror}",
                    hint=f"set `{ENVIRONMENT}` to a folder that you can write to",
                ) from error
            raise

    def _concerns_cache(self, error: OSError) -> bool:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
            return True
        return isinstance(error.filename, str | os.PathLike) and (
            Path(error.filename) == self.root
            or self.root in Path(error.filename).parents
            or Path(error.filename) in self.root.parents
        )


def is_whole(entry: Path, key: str) -> bool:
    """Whether `entry` holds exactly the files of its index, byte for byte. Reads all of it."""
    try:
        index = json.loads((entry / INDEX).read_bytes())
        found = _contents(entry)
    except (OSError, ValueError, EdgegenError):
        return False
    found.pop(INDEX, None)
    return bool(index == {"key": key, "files": found})


def recorded_files(entry: Path) -> dict[Path, str]:
    """Path -> sha256 of each file of an entry that `Cache.directory` gave, as it was when it was made or last found
    whole."""
    files = json.loads((entry / INDEX).read_bytes())["files"]
    return {entry / name: sha for name, sha in files.items() if sha != "folder"}


def _contents(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of each file, or `folder`; EdgegenError for anything else."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise EdgegenError(f"`{name}` is neither file nor folder and cannot be cached")
        if path.is_dir():
            found[name] = "folder"
        else:
            with path.open("rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("a part of a cache key has a name that is not text")
        return {name: _plain(item) for name, item in value.items()}
    raise TypeError(f"a part of a cache key is a {type(value).__name__}, not a JSON value")


def _bytes(folder: Path) -> int:
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(base, name)).st_size  # noqa: PTH118 - os.walk gives text
            except FileNotFoundError:  # someone else's build finished or was swept meanwhile
                continue
    return total


def _sync(folder: Path) -> None:
    """Files before the folders that name them, so that the rename never publishes what is not on disk."""
    for base, _, files in os.walk(folder, topdown=False):
        for name in files:
            with open(os.path.join(base, name), "rb") as stream:  # noqa: PTH118, PTH123 - os.walk gives text
                os.fsync(stream.fileno())
        _sync_folder(Path(base))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, operation: int) -> None:
    fcntl.flock(descriptor, operation)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
