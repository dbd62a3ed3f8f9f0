"""A tokenizer for students whose vocabulary nobody may ship here: CLIP's, without its merges.

It has CLIP's special ids (start 49406, end and padding 49407) and CLIP's ids of single bytes (0..255 inside a word,
256..511 at its end; one higher where 0 is the padding, as with SD 2's tokenizer). It cuts text into bytes where CLIP's
cuts it into pieces of words: pictures of a trained student drawn with it do not follow the prompt. Encoders with a
smaller table or another padding (T5, Gemma, Qwen) get the same with ids that their table has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from edgegen.errors import UsageError
from edgegen.students.config import ComponentConfig

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
PADDING = "<|padding|>"
BYTES = 512
NOTE = (
    "the tokenizer is a stand-in that cuts text into single bytes: "
    "`edgegen student new FAMILY --tokenizer tokenizer.json` takes the real one"
)
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def stand_in_for(config: ComponentConfig, padding: int | None = None) -> str:
    """The stand-in for a text encoder, with ids that its config's `vocab_size` and `pad_token_id` allow; `padding` is
    the id that stands for none where the config names none."""
    sizes = list(_values(config.config, "vocab_size"))
    padding = config.config.get("pad_token_id", padding)
    return stand_in_tokenizer(config.inputs[0].shape[-1], min(sizes, default=END_ID + 1), padding)


def _values(config: Mapping[str, Any], key: str) -> Iterator[int]:
    for name, value in config.items():
        if name == key and isinstance(value, int):
            yield value
        elif isinstance(value, Mapping):
            yield from _values(value, key)


def stand_in_tokenizer(length: int, vocabulary_size: int = END_ID + 1, padding: int | None = None) -> str:
    """A `tokenizer.json` that pads and cuts to `length` ids, all below `vocabulary_size`; `padding` is the id that
    stands for none, CLIP's end where it is None. UsageError for a table too small for bytes."""
    from tokenizers import pre_tokenizers

    end_id = min(END_ID, vocabulary_size - 1 - (padding == vocabulary_size - 1))
    start_id = end_id - 1 - (padding == end_id - 1)
    first = 0 if padding is None or padding >= BYTES else padding + 1
    if first + BYTES > start_id:
        raise UsageError(
            f"a vocabulary of {vocabulary_size} has no room for the stand-in's bytes",
            hint="give its own: `edgegen student new FAMILY --tokenizer tokenizer.json`",
        )
    pad_id, pad = (end_id, END) if padding is None else (padding, PADDING)

    # Bytes stand for themselves where they print, the others for characters from 256 on: sorted, they are CLIP's order.
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: first + index for index, character in enumerate(characters)}
    vocabulary |= {f"{character}</w>": first + 256 + index for index, character in enumerate(characters)}
    specials = {START: start_id, END: end_id, pad: pad_id}
    vocabulary |= specials
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    made: dict[str, Any] = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": length},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": pad_id,
            "pad_type_id": 0,
            "pad_token": pad,
        },
        "added_tokens": [
            {"id": identity, "content": text, **special}
            for text, identity in sorted(specials.items(), key=lambda one: one[1])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, end_id],
            "cls": [START, start_id],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    return json.dumps(made, ensure_ascii=False)
