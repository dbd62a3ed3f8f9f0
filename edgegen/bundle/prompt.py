"""A prompt as the ids that a bundle's text encoder takes. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgegen.bundle.open import Bundle
from edgegen.errors import EdgegenError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class PromptReader:
    """The bundle's tokenizer; `shape` is what its text encoder takes. EdgegenError for one that cannot be used."""

    def __init__(self, bundle: Bundle, shape: tuple[int, ...]) -> None:
        self._tokenizer, self._unknown = _tokenizer(bundle)
        self._shape = shape

    def read(self, prompt: str) -> tuple[NDArray[np.int32], tuple[str, ...]]:
        """`prompt` -> input_ids [1, L] int32, and what was not read as it is: unknown words, a cut end."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UsageError("the prompt is no valid text (UTF-8)", hint="type the prompt in UTF-8") from error
        encoding = self._tokenizer.encode(prompt)
        if len(encoding.ids) != self._shape[-1]:
            raise EdgegenError(
                f"the bundle's tokenizer gives {len(encoding.ids)} ids, its text encoder takes {self._shape[-1]}"
            )
        warnings = []
        if self._unknown is not None:
            read = zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
            unknown = [
                prompt[start:end] for token, (start, end), special in read if token == self._unknown and not special
            ]
            if words := ", ".join(f"`{word}`" for word in dict.fromkeys(unknown) if word):
                warnings.append(f"the student does not know {words}; it reads an unknown word there")
        cut = [offset for part in encoding.overflowing for offset in _kept_offsets(part)]
        if cut:
            rest = prompt[min(start for start, _ in cut) :]
            warnings.append(f"the prompt is longer than the student reads; `{rest}` is cut off")
        return np.array([encoding.ids], dtype=np.int32).reshape(self._shape), tuple(warnings)


def _tokenizer(bundle: Bundle) -> tuple[Tokenizer, int | None]:
    """The tokenizer and the id that it gives to unknown words, None where it has no word for them."""
    from tokenizers import Tokenizer

    assert bundle.manifest.tokenizer is not None
    path: Path = bundle.path(bundle.manifest.tokenizer)
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        unknown = json.loads(text)["model"].get("unk_token")
    except Exception as error:  # the library raises bare Exception for a file it cannot use
        raise EdgegenError(f"tokenizer `{path}` cannot be used: {error}", hint="build the bundle again") from error
    return tokenizer, tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None


def _kept_offsets(encoding: Any) -> list[tuple[int, int]]:
    """Where the real tokens of an encoding lie in the prompt."""
    read = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return [offset for offset, special in read if not special]
