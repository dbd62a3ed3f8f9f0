"""`edgegen`: the command group, and where every error becomes a message on stderr and an exit code.

Exit codes: 0 done, 1 failed, 2 usage, 3 a gate was not met, 4 device unreachable, 5 input refused as unsafe; 130
interrupted, 141 the reader of our output left.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence

import click

from edgegen import __version__
from edgegen.cli.console import hush_imports, prepare_streams, settle_stdout, show_error
from edgegen.cli.group import READER_LEFT, Lazy, LazyGroup
from edgegen.errors import EdgegenError

INTERRUPTED = 130
COMMANDS = {
    "build": Lazy("edgegen.cli.build:command", "Compile a student for a target into a bundle, and prove it"),
    "verify": Lazy("edgegen.cli.verify:command", "Hold a bundle's artifacts against its reference again"),
    "run": Lazy("edgegen.cli.run:command", "Draw a picture with a bundle on this machine"),
    "inspect": Lazy("edgegen.cli.inspect:command", "Count parameters, MACs and ops of a model or a bundle"),
    "plan": Lazy("edgegen.cli.plan:command", "Choose one precision for each op, within a budget, and write it down"),
    "prune": Lazy("edgegen.cli.prune:command", "Take channels, heads and blocks out of a student, within a budget"),
    "tune": Lazy(
        "edgegen.cli.tune:command", "Choose widths, blocks and precisions together; write the best as recipes"
    ),
    "passes": Lazy("edgegen.cli.passes:command", "List, show and run the rewrites of graphs"),
    "targets": Lazy("edgegen.cli.targets:command", "List, show and validate target devices"),
    "cache": Lazy("edgegen.cli.cache:command", "Show or empty the cache that builds share"),
    "student": Lazy("edgegen.cli.student:command", "Pack or evaluate the student that ships"),
    "doctor": Lazy("edgegen.cli.doctor:command", "Say what is installed and what each missing part would enable"),
}


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 gate not met, 4 device unreachable, 5 refused as unsafe.",
)
@click.version_option(__version__, "-V", "--version", prog_name="edgegen", message="%(prog)s %(version)s")
def cli() -> None:
    """Compile distilled few-step generative students for phones and boards.

    A build is proved before it is done: every artifact that this machine can execute is run and held against the
    student that it came from.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: `sys.argv`) and return its exit code; never raises for what a user can cause."""
    args = list(sys.argv[1:] if argv is None else argv)
    prepare_streams()
    hush_imports()
    try:
        code = _run(args)
    except KeyboardInterrupt:  # before click takes over, or while an error is being shown
        show_error("interrupted", None)
        code = INTERRUPTED
    return settle_stdout(code)


def _run(args: list[str]) -> int:
    try:
        result = cli.main(args=args, prog_name="edgegen", standalone_mode=False)
    except click.Abort as error:
        return _fail(error, "interrupted", None, INTERRUPTED)
    except EdgegenError as error:
        return _fail(error, error.message, error.hint, error.exit_code)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "edgegen"
        return _fail(error, _in_our_words(error.format_message()), f"`{path} --help`", error.exit_code)
    except click.ClickException as error:
        return _fail(error, _in_our_words(error.format_message()), None, error.exit_code)
    except OSError as error:
        where = f": `{os.fsdecode(error.filename)}`" if isinstance(error.filename, str | bytes) else ""
        return _fail(error, f"{error.strerror or error}{where}", _debug_hint(args), EdgegenError.exit_code)
    except MemoryError as error:
        return _fail(error, "this process ran out of memory", _debug_hint(args), EdgegenError.exit_code)
    except Exception as error:
        text = " ".join(str(error).split())
        what = f"unexpected {type(error).__name__}" + (f": {text[:500]}" if text else "")
        return _fail(error, what, _debug_hint(args), EdgegenError.exit_code)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _fail(error: BaseException, message: str, hint: str | None, code: int) -> int:
    if os.environ.get("EDGEGEN_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    show_error(message, hint)
    return code


def _debug_hint(args: list[str]) -> str:
    return f"`EDGEGEN_DEBUG=1 {shlex.join(['edgegen', *args])}` shows where it happened"


def _in_our_words(message: str) -> str:
    """Click's sentence as one of ours: lower case, backticks around what can be typed, no full stop."""
    text = re.sub(r"'([^'\n]*)'", r"`\1`", message.strip()).removesuffix(".")
    return text[:1].lower() + text[1:]


__all__ = ["COMMANDS", "INTERRUPTED", "READER_LEFT", "cli", "main"]

if __name__ == "__main__":
    sys.exit(main())
