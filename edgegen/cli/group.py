"""Command groups: commands that are imported on first use, and unknown names answered with the nearest ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from edgegen.cli.console import reader_left
from edgegen.errors import EdgegenError, UsageError

READER_LEFT = 141
"""What a shell reports for a program that SIGPIPE ended: whoever read our output stopped reading."""


@dataclass(frozen=True)
class Lazy:
    """A command not imported yet: `target` is `module:attribute`, `help` is what the group's help says of it."""

    target: str
    help: str


class SuggestingGroup(click.Group):
    """A group without silent exits: no command is exit 2 with help on stderr, an unknown one names its neighbours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(UsageError.exit_code)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = get_close_matches(name, self.list_commands(ctx), n=3)
            hint = " or ".join(f"`{ctx.command_path} {command}`" for command in near)
            raise UsageError(f"command `{name}` is unknown", hint=hint or f"`{ctx.command_path} --help`")
        return super().resolve_command(ctx, args)


class LazyGroup(SuggestingGroup):
    """The top group: help and completion come from `lazy` alone, a command's module is imported when it is called."""

    def __init__(self, *args: Any, lazy: Mapping[str, Lazy], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name].target.partition(":")
        try:
            command: click.Command = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "edgegen":
                raise
            raise EdgegenError(
                f"command `{cmd_name}` needs `{error.name}`, which is not installed",
                hint=f"`{sys.executable} -m pip install edgegen` brings it",
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in self.lazy.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[click.shell_completion.CompletionItem]:
        return [
            click.shell_completion.CompletionItem(name, help=lazy.help)
            for name, lazy in self.lazy.items()
            if name.startswith(incomplete)
        ]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # click would end in a bare exit 1, whichever pipe it was
            if not reader_left():
                raise EdgegenError("a pipe to another process broke") from error
            ctx.exit(READER_LEFT)
