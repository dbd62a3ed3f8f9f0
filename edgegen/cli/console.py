r"""What a command says and where: data on stdout, talk on stderr, progress only for people.

Every command that reports takes `@reporting` and gets an `Output`:

    @click.command("list")
    @reporting
    def list_command(output: Output) -> None:
        output.report({"targets": names}, "\n".join(names))
"""

from __future__ import annotations

import io
import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import click

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

P = ParamSpec("P")
R = TypeVar("R")


def clean(text: str) -> str:
    """`text` with every control character except newline and tab escaped: names come from files that others wrote."""
    return "".join(char if char in "\n\t" or char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def colours(stream: Any) -> bool:
    """Whether `stream` is a terminal that wants colour; NO_COLOR (no-color.org) says no."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def show_error(message: str, hint: str | None) -> None:
    """`error: ...` and, after a blank line, `hint: ...`, on stderr."""
    colour = colours(sys.stderr)
    _stderr(_styled("error", "red", colour) + f": {clean(message)}")
    if hint:
        _stderr("\n" + _styled("hint", "cyan", colour) + f": {clean(hint)}")


def _styled(word: str, colour: str, on: bool) -> str:
    return click.style(word, fg=colour, bold=True) if on else word


def _stderr(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody listens: the exit code still tells
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - stays open as the stream


@dataclass(frozen=True)
class Output:
    """How this command reports, as its `--json` and `-q` said."""

    json: bool = False
    quiet: bool = False

    def report(self, data: object, text: str | Callable[[], str]) -> None:
        """The command's result on stdout: `data` (plain JSON values) with `--json`, `text` for people without."""
        if self.json:
            click.echo(json.dumps(data, indent=2, allow_nan=False))
        else:
            click.echo(text if isinstance(text, str) else text())

    def say(self, text: str) -> None:
        """Talk, on stderr; nothing with `-q`."""
        if not self.quiet:
            _stderr(clean(text))

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """`progress` as `-q` has it."""
        with progress(quiet=self.quiet) as shown:
            yield shown


def reporting(command: Callable[..., R]) -> Callable[..., R]:
    """Adds `--json` and `-q/--quiet`; the command gets them as `output: Output`."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr except errors.")
    @wraps(command)
    def wrapped(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> R:
        logger = logging.getLogger("edgegen")
        level = logger.level
        if quiet:
            logger.setLevel(logging.ERROR)
        try:
            return command(*args, output=Output(json=as_json, quiet=quiet), **kwargs)
        finally:
            logger.setLevel(level)

    return wrapped


class Progress(Protocol):
    """Long work as people see it. Safe to call from several threads; one stage is open at a time."""

    def stage(self, name: str, total: int) -> None:
        """End the stage before and open `name`, which is `total` steps long (0: not known)."""
        ...

    def advance(self) -> None:
        """One step of the open stage is done."""
        ...

    def note(self, text: str) -> None:
        """A line worth keeping."""
        ...

    def status(self, text: str) -> None:
        """How the open stage stands: shown beside its bar until the next one, where there is a bar."""
        ...


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Bars on a terminal, one line for each finished stage elsewhere, nothing when `quiet`.

    A stage that an exception leaves open is never said to be finished.
    """
    shown: _Silent | _Lines | _Bars
    if quiet:
        shown = _Silent()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        shown = _Bars()
    else:
        shown = _Lines()
    try:
        yield shown
    except BaseException:
        shown.close(finished=False)
        raise
    shown.close(finished=True)


class _Silent:
    def stage(self, name: str, total: int) -> None: ...

    def advance(self) -> None: ...

    def note(self, text: str) -> None: ...

    def status(self, text: str) -> None: ...

    def close(self, *, finished: bool) -> None: ...


class _Lines:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._name: str | None = None
        self._total = self._done = 0
        self._started = 0.0

    def stage(self, name: str, total: int) -> None:
        with self._lock:
            self._end()
            self._name, self._total, self._done = name, total, 0
            self._started = time.monotonic()

    def advance(self) -> None:
        with self._lock:
            self._done += 1

    def note(self, text: str) -> None:
        with self._lock:
            _stderr(f"  {clean(text)}")

    def status(self, text: str) -> None: ...

    def close(self, *, finished: bool) -> None:
        with self._lock:
            if finished:
                self._end()
            self._name = None

    def _end(self) -> None:
        if self._name is None:
            return
        count = f" {self._done}/{self._total}" if self._total > 1 else ""
        _stderr(f"{clean(self._name)}{count} ({time.monotonic() - self._started:.1f} s)")


class _Bars:
    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._lock = threading.RLock()
        self._task: TaskID | None = None
        self._bars: RichProgress = RichProgress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=Console(stderr=True, highlight=False, markup=False),
        )
        self._bars.start()

    def stage(self, name: str, total: int) -> None:
        with self._lock:
            self._end()
            self._task = self._bars.add_task(clean(name), total=total or None, status="")

    def advance(self) -> None:
        with self._lock:
            if self._task is not None:
                self._bars.advance(self._task)

    def note(self, text: str) -> None:
        self._bars.console.print(f"  {clean(text)}")

    def status(self, text: str) -> None:
        with self._lock:
            if self._task is not None:
                self._bars.update(self._task, status=clean(text))

    def close(self, *, finished: bool) -> None:
        with self._lock:
            if finished:
                self._end()
            self._bars.stop()

    def _end(self) -> None:
        if self._task is None:
            return
        task = next(task for task in self._bars.tasks if task.id == self._task)
        if task.total is None:
            self._bars.update(self._task, total=max(1, int(task.completed)), completed=max(1, int(task.completed)))
        self._bars.stop_task(self._task)
        self._task = None


def prepare_streams() -> None:
    """A name that the terminal's encoding lacks is escaped instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


ASIDES = ("coremltools", "torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Libraries that warn, while they are imported, of versions and of kernels for other machines."""


def hush_imports() -> None:
    """Errors alone of `ASIDES`: what is compiled is proven, and `edgegen doctor` says which versions go together."""
    for name in ASIDES:
        logging.getLogger(name).setLevel(logging.ERROR)


def reader_left() -> bool:
    """Whether stdout is a pipe whose reader is gone."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # a stand-in without a descriptor, or closed
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are told without being asked for
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def settle_stdout(code: int) -> int:
    """Flush stdout; the exit code when that fails is 141 (the reader left) or, said on stderr, 1."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()
        return 141
    except OSError as error:
        _abandon_stdout()
        if code == 0:
            show_error(f"standard output cannot be written: {error.strerror}", None)
        return code or 1
    return code


def _abandon_stdout() -> None:
    # The interpreter flushes once more at exit; what is left in the buffer goes nowhere.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def names_between_commas(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Comma-separated names; click.BadParameter for an empty one."""
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise click.BadParameter("an empty name between commas")
    return tuple(dict.fromkeys(names))
