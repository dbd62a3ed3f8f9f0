"""Stable Diffusion's first names, as kohya writes them for SDXL, in diffusers' words."""

from __future__ import annotations

import re

LAYERS = 2
"""Residual blocks a level, in every published UNet with these names."""
INNER = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
WHOLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d+)_(.+)")
_MIDDLE = re.compile(r"middle_block_([012])_(.+)")


def in_diffusers_words(module: str) -> str:
    """`input_blocks_4_1_proj_in` -> `down_blocks_1_attentions_0_proj_in`; any other name as it is."""
    if module in WHOLE:
        return WHOLE[module]
    if match := _MIDDLE.fullmatch(module):
        place = ("resnets_0", "attentions_0", "resnets_1")[int(match[1])]
        return f"mid_block_{place}_{INNER.get(match[2], match[2])}"
    match = _BLOCK.fullmatch(module)
    if match is None:
        return module
    side, index, part, rest = match[1], int(match[2]), int(match[3]), match[4]
    level, layer = divmod(index - (side == "input"), LAYERS + 1)
    block = f"{'down' if side == 'input' else 'up'}_blocks_{level}"
    if side == "input" and layer == LAYERS:
        return f"{block}_downsamplers_0_conv" if rest == "op" else module
    if side == "output" and rest == "conv":
        return f"{block}_upsamplers_0_conv"
    return f"{block}_{'attentions' if part else 'resnets'}_{layer}_{INNER.get(rest, rest)}"
