"""A diffusers folder in small: the configs of a student, and safetensors weights only where asked for."""

import json
from pathlib import Path

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizerFast"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
}
TEXT = {
    "vocab_size": 27,
    "max_position_embeddings": 16,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "gelu",
}
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 96, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "mid_block_type": None,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
}
VAE = {
    "latent_channels": 4,
    "encoder_block_out_channels": [48, 48, 48],
    "decoder_block_out_channels": [48, 48, 48],
    "num_encoder_blocks": [1, 2, 2],
    "num_decoder_blocks": [2, 2, 1],
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def write_configs(folder: Path) -> None:
    """Everything but weights and tokenizer."""
    parts = {
        "model_index.json": INDEX,
        "text_encoder/config.json": TEXT,
        "unet/config.json": UNET,
        "vae/config.json": VAE,
        "scheduler/scheduler_config.json": SCHEDULER,
    }
    for name, content in parts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
