"""Amounts as people type them: a number and a unit."""

from __future__ import annotations

import re

import click

BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-zA-Z%]{0,3})")


def amount(value: str, wanted: str) -> tuple[float, str]:
    """Number and lower-case unit; click.BadParameter says that `value` is not `wanted` for anything else, and for 0."""
    match = _NUMBER.fullmatch(value.strip())
    if match is None or float(match[1]) == 0:
        raise click.BadParameter(f"`{value}` is not {wanted}")
    return float(match[1]), match[2].lower()


def byte_count(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Option callback: `300MB`, `2GiB` or a plain number of bytes."""
    if value is None:
        return None
    wanted = "bytes as `300000000`, `300MB` or `2GiB`"
    number, unit = amount(value, wanted)
    if unit not in BYTE_UNITS:
        raise click.BadParameter(f"`{value}` is not {wanted}")
    return int(number * BYTE_UNITS[unit])


def share(value: str, wanted: str) -> float:
    """`60%` or `0.6x` as 0.6; click.BadParameter for anything else."""
    number, unit = amount(value, wanted)
    if unit not in ("x", "%"):
        raise click.BadParameter(f"`{value}` is not {wanted}")
    return number / 100 if unit == "%" else number


def milliseconds_or_share(value: str) -> tuple[float, bool]:
    """Of the latency that a student has: `120ms`, or `0.6x` or `60%`; the number, and whether it is milliseconds."""
    wanted = "milliseconds as `120ms`, or a share of what it is as `0.6x` or `60%`"
    number, unit = amount(value, wanted)
    return (number, True) if unit == "ms" else (share(value, wanted), False)
