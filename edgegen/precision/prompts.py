"""What calibration draws: the prompts and settings in `calibration/`, or a user's own file. Imports no torch."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgegen.errors import UsageError
from edgegen.files import shipped

if TYPE_CHECKING:
    from edgegen.students.student import Student

SIZE_LIMIT = 1 << 20
"""Bytes of a file of prompts."""
PICTURES = 64
"""Example pictures that a student which starts from one is calibrated on, at most."""
LONGEST = 2000
"""Letters of a prompt."""


FILE_HINT = (
    "give a text file in UTF-8 with one prompt a line (`--calibration prompts.txt`), or leave `--calibration` out: "
    "prompts ship with edgegen"
)


class Settings(BaseModel):
    """How ranges are observed: `calibration/settings.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: Annotated[int, Field(ge=1)]
    """At most so many are drawn, from the first on."""
    fewest: Annotated[int, Field(ge=1)]
    """With fewer, calibration is refused."""
    macs: Annotated[int, Field(ge=0)]
    """Fewer prompts, down to `fewest`, are drawn of a student that takes more multiplications than this for all."""
    seed: int
    observer: Literal["mse", "minmax"]
    disagreement: Annotated[float, Field(ge=1.0)]
    """Ranges are kept for each timestep where the widest is so many times as wide as the narrowest."""


def data_folder() -> Path:
    """`calibration/` of the checkout, or its copy in the installed package."""
    return shipped("calibration", "settings.toml", "the calibration prompts")


@cache
def default_settings() -> Settings:
    """Those that ship."""
    return Settings.model_validate(tomllib.loads((data_folder() / "settings.toml").read_text()))


def prompts_for(student: Student, path: Path | None = None) -> tuple[str, ...]:
    """The prompts of the file at `path`, or the first file that ships, that of the student's name before others, whose
    words the student's tokenizer knows. A student that starts from a picture has names of example pictures in place
    of prompts; one that draws nothing has (). UsageError when there is none."""
    if student.config.conditioning is None:
        return ()
    if path is not None:
        return read_prompts(path)
    if student.config.conditioning == "image_encoder":
        return tuple(f"example picture {index}" for index in range(1, PICTURES + 1))
    folder = data_folder()
    files = sorted(folder.glob("*.txt"), key=lambda file: (file.stem != student.config.name, file.stem != "general"))
    for file in files:
        found = read_prompts(file)
        if not any(_unknown(student, prompt) for prompt in found):
            return found
    raise UsageError(
        f"the tokenizer of student `{student.config.name}` knows none of the calibration prompts that ship",
        hint="give a file with one prompt a line: `--calibration prompts.txt`",
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line; blank lines and those that begin with # are left out. UsageError for what is no such file."""
    try:
        with path.open("rb") as stream:
            content = stream.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise UsageError(f"calibration prompts `{path}` cannot be read: {error.strerror}", FILE_HINT) from error
    if len(content) > SIZE_LIMIT:
        raise UsageError(f"calibration prompts `{path}` are more than {SIZE_LIMIT >> 20} MiB", FILE_HINT)
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"calibration prompts `{path}` are not UTF-8 text (byte {error.start})", FILE_HINT) from error
    return tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))


def check_prompts(student: Student, prompts: Sequence[str], fewest: int) -> tuple[str, ...]:
    """`prompts` as they are; UsageError when there are fewer than `fewest` different ones, or one is broken."""
    for number, prompt in enumerate(prompts, start=1):
        reason = _broken(prompt) or (
            "the student's tokenizer does not know its words" if _unknown(student, prompt) else None
        )
        if reason is not None:
            raise UsageError(f"calibration prompt {number}, {os.fsdecode(repr(prompt[:60]))}: {reason}")
    different = len(set(prompts))
    if different < fewest:
        raise UsageError(
            f"calibration has {different} different prompts, and fewer than {fewest} say too little about ranges",
            hint=f"give a file with at least {fewest} prompts that are like those of your users",
        )
    return tuple(prompts)


def _broken(prompt: str) -> str | None:
    if not prompt.strip():
        return "it is empty"
    if len(prompt) > LONGEST:
        return f"it is longer than {LONGEST} letters"
    if any(ord(letter) < 32 or letter == "\ufffd" for letter in prompt):
        return "it holds control or replacement characters"
    return None


def _unknown(student: Student, prompt: str) -> bool:
    """Whether more than half of the words of `prompt` are the tokenizer's unknown one."""
    if student.tokenizer_json is None:
        return False
    unknown = getattr(student.tokenizer.model, "unk_token", None)
    made = student.tokenizer.encode(prompt)
    words = [token for token, special in zip(made.tokens, made.special_tokens_mask, strict=True) if not special]
    return bool(words) and 2 * sum(token == unknown for token in words) > len(words)
