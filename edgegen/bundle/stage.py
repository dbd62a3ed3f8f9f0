"""A folder that appears whole or not at all: staged beside its destination, fsynced, put in place in one rename.

Beside a destination `out/phone` a build may leave, when it is killed, `out/.phone.edgegen-new-*` (half written),
`out/.phone.edgegen-old-*` (what was replaced) and `out/.phone.edgegen-lock`. The next build into the same place, once
it holds the lock, restores or removes them: nobody else can be using them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from edgegen.errors import EdgegenError, UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # <linux/fs.h>
_RENAME_SWAP = 2  # <sys/stdio.h> of macOS
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Staging:
    """A private folder beside `destination`, under its lock; made by `stage`."""

    def __init__(self, destination: Path, path: Path, replaceable: Callable[[Path], str | None]) -> None:
        self.destination = destination
        self.path = path
        self._replaceable = replaceable

    def commit(self) -> Path:
        """Make everything durable and put it at `destination`, replacing what `replaceable` allows.

        At every instant the old or the new content is whole at the destination; where the file system cannot exchange
        two folders, the old one is for a moment beside it under the name that the next build restores.
        """
        sync_tree(self.path)
        refuse_unless_replaceable(self.destination, self._replaceable)
        if not self.destination.exists() or not any(self.destination.iterdir()):
            self.path.rename(self.destination)  # an empty folder is replaced by rename itself
            sync(self.destination.parent)
            return self.destination
        if _exchange(self.path, self.destination):
            sync(self.destination.parent)
            # The staging name now holds the old content; the caller's cleanup removes it.
            return self.destination
        aside = _sibling(self.destination, "old")
        self.destination.rename(aside)
        try:
            self.path.rename(self.destination)
        except BaseException:
            aside.rename(self.destination)
            raise
        sync(self.destination.parent)
        shutil.rmtree(aside)
        return self.destination


@contextmanager
def stage(destination: Path, replaceable: Callable[[Path], str | None]) -> Iterator[Staging]:
    """Lock `destination`, clear what killed builds left beside it, and give a fresh folder to fill.

    `replaceable` says why the folder that is there must not be replaced, or None. UsageError when it must not;
    EdgegenError when another build holds the lock, nothing can be written, or the disk is full. The staged folder is
    gone afterwards, whatever happens.
    """
    destination = _resolved(destination)
    refuse_unless_replaceable(destination, replaceable)
    with ExitStack() as stack:
        with told_as_errors(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(destination))
            _clear_litter(destination)
            refuse_unless_replaceable(destination, replaceable)
            path = _sibling(destination, "new")
            path.mkdir()
            stack.callback(shutil.rmtree, path, ignore_errors=True)
        yield Staging(destination, path, replaceable)


def refuse_unless_replaceable(destination: Path, replaceable: Callable[[Path], str | None]) -> None:
    """UsageError when something is at `destination` that a bundle must not take the place of."""
    hint = "choose another `--output`, or move what is there away"
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UsageError(f"`{destination}` is a file; a bundle is a folder", hint=hint)
    if any(destination.iterdir()):
        reason = replaceable(destination)
        if reason is not None:
            raise UsageError(f"`{destination}` is not replaced: {reason}", hint=hint)


@contextmanager
def told_as_errors(destination: Path) -> Iterator[None]:
    """OSError from writing at `destination` -> EdgegenError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            free = f"free some space on the disk of `{destination.parent}`, or choose another `--output`"
            raise EdgegenError(f"`{destination}` cannot be written whole: {reason}", hint=free) from error
        where = f" (`{error.filename}`)" if error.filename else ""
        raise EdgegenError(
            f"`{destination}` cannot be written: {reason}{where}", hint="choose another `--output`"
        ) from error


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """fsync every file and every folder below `root`, and `root`."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


def _resolved(destination: Path) -> Path:
    """The folder meant: a link is followed, so that renames happen where the content is."""
    try:
        resolved = destination.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UsageError(f"`{destination}` cannot be followed: {error}", hint="choose another `--output`") from error
    if not resolved.name:
        raise UsageError(f"`{destination}` cannot be a bundle", hint="choose a folder with a name for `--output`")
    return resolved


def _sibling(destination: Path, kind: str) -> Path:
    return destination.with_name(f".{destination.name}.edgegen-{kind}-{secrets.token_hex(8)}")


@contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """An exclusive lock that dies with the process; its file is removed when the lock is given back."""
    path = destination.with_name(f".{destination.name}.edgegen-lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed this very file: then it guards nothing, and we try again.
            if _same_file(handle, path):
                break
        except BlockingIOError as error:
            os.close(handle)
            raise EdgegenError(
                f"another build is writing `{destination}`", hint="wait for it, or choose another `--output`"
            ) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        os.close(handle)


def _same_file(handle: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _clear_litter(destination: Path) -> None:
    """Restore or remove what killed builds left; only folders whose name we alone give are touched."""
    name = re.compile(re.escape(f".{destination.name}.edgegen-") + r"(new|old)-[0-9a-f]{16}")
    for path in sorted(destination.parent.iterdir()):
        match = name.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        empty = not destination.exists() or not any(destination.iterdir())
        if match[1] == "old" and empty:
            path.rename(destination)
        else:
            shutil.rmtree(path)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        status = libc.renamex_np(first, second, ctypes.c_uint(_RENAME_SWAP))
    elif hasattr(libc, "renameat2"):
        status = libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_RENAME_EXCHANGE))
    else:
        return False
    if status == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(b))
