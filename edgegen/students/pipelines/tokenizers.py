"""The tokenizer of a folder, made to give what its pipeline gives the text encoder: padding, cutting, instructions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgegen.errors import EdgegenError
from edgegen.students.archive import read_json, read_small
from edgegen.students.assembly import check_tokenizer
from edgegen.students.pipelines.files import SAVE_HINT, inside


def read_tokenizer(folder: Path, part: str = "tokenizer") -> str:
    """`<part>/tokenizer.json`, as text that `tokenizers` can read; EdgegenError says how it is made where it is not."""
    if not (folder / part / "tokenizer.json").exists():
        raise EdgegenError(
            f"`{part}/tokenizer.json` is missing in `{folder}`",
            hint="from its vocab.json and merges.txt, or its spiece.model: "
            f'`python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{folder}/{part}').backend_tokenizer.save('{folder}/{part}/tokenizer.json')\"`",
        )
    try:
        text = read_small(inside(folder, f"{part}/tokenizer.json")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EdgegenError(f"`{part}/tokenizer.json` in `{folder}` is not UTF-8 text") from error
    check_tokenizer(text, folder.name)
    return text


def padding_token(folder: Path, text: str, default: str, part: str = "tokenizer") -> tuple[str, int]:
    """What the tokenizer fills up with, and its id."""
    from tokenizers import Tokenizer

    path = folder / part / "tokenizer_config.json"
    settings = read_json(inside(folder, f"{part}/tokenizer_config.json")) if path.exists() else {}
    token = settings.get("pad_token") or default
    token = token.get("content") if isinstance(token, dict) else token
    identity = Tokenizer.from_str(text).token_to_id(token) if isinstance(token, str) else None
    if identity is None or not isinstance(token, str):
        raise EdgegenError(f"the tokenizer of `{folder}` has no padding token {token!r}", hint=SAVE_HINT)
    return token, identity


def padded(folder: Path, text: str, length: int, token: str, identity: int) -> str:
    """`text` with padding and cutting to `length`, as it is where it does so already."""
    data = json.loads(text)
    padding, truncation = data.get("padding") or {}, data.get("truncation") or {}
    if (
        padding.get("strategy") == {"Fixed": length}
        and padding.get("direction", "Right") == "Right"
        and truncation.get("max_length") == length
    ):
        return text
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=identity, pad_token=token)
    made: str = tokenizer.to_str()
    return made


def after_instruction(text: str, instruction: str) -> str:
    """`text` for prompts in lower case, without blanks at their ends, behind `instruction` (which may be empty)."""
    data = json.loads(text)
    before: list[dict[str, Any]] = [{"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Lowercase"}]
    before += [{"type": "Prepend", "prepend": instruction}] if instruction else []
    own = data.get("normalizer")
    data["normalizer"] = {"type": "Sequence", "normalizers": before + ([own] if own else [])}
    return json.dumps(data, ensure_ascii=False)


def in_chat(text: str, before: str, after: str) -> str:
    """`text` for prompts between two fixed pieces of text: a chat's one question and the head of its answer."""
    from tokenizers import Tokenizer

    data = json.loads(text)
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    special = {}
    for name, words in (("before", before), ("after", after)):
        encoded = tokenizer.encode(words, add_special_tokens=False)
        special[name] = {"id": name, "ids": encoded.ids, "tokens": encoded.tokens}

    def piece(kind: str, name: str) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": 0}}

    whole = [piece("SpecialToken", "before"), piece("Sequence", "A"), piece("SpecialToken", "after")]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": whole,
        "pair": [*whole, piece("Sequence", "B")],
        "special_tokens": special,
    }
    return json.dumps(data, ensure_ascii=False)


def count(text: str, prompt: str) -> int:
    """Tokens of `prompt`, neither cut nor filled up."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return len(tokenizer.encode(prompt).ids)
