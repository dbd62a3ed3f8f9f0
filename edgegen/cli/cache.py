"""`edgegen cache`: where the stages that builds share are kept, and emptying it."""

from __future__ import annotations

import click

from edgegen.cli.console import Output, reporting
from edgegen.cli.group import SuggestingGroup


@click.group(cls=SuggestingGroup)
def command() -> None:
    """Show or empty the cache that builds share (`EDGEGEN_CACHE_DIR` moves it)."""


@command.command("dir")
@reporting
def dir_command(output: Output) -> None:
    """Print the cache's folder."""
    from edgegen.cache import Cache

    cache = Cache()
    held = cache.size()
    output.report({"dir": str(cache.root), "entries": held.entries, "bytes": held.bytes}, str(cache.root))
    output.say(f"{held.entries} entries, {readable(held.bytes)}")


@command.command("clean")
@reporting
def clean_command(output: Output) -> None:
    """Delete every entry, and say how much that freed. Refused while a build uses the cache."""
    from edgegen.cache import Cache

    cache = Cache()
    freed = cache.clean()
    output.report(
        {"dir": str(cache.root), "entries": freed.entries, "bytes": freed.bytes},
        f"freed {freed.bytes} bytes ({readable(freed.bytes)}) in {freed.entries} entries",
    )


def readable(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
