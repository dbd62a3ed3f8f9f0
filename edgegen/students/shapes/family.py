"""The `shapes` student's networks, tokenizer and weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.config import ComponentConfig, LatentConfig, StudentConfig
from edgegen.students.networks.clip_text import ClipTextConfig
from edgegen.students.networks.tiny_decoder import TinyDecoderConfig
from edgegen.students.networks.unet import UNetConfig
from edgegen.students.sampler import SamplerConfig
from edgegen.students.shapes.grammar import vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

WEIGHTS = Path(__file__).parent / "weights" / "shapes.safetensors"
START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
CONTEXT_LENGTH = 16
LATENT_SHAPE = (1, 4, 16, 16)

TEXT_ENCODER = ClipTextConfig(
    vocab_size=len(vocabulary()) + 3,
    max_position_embeddings=CONTEXT_LENGTH,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=512,
)
DENOISER = UNetConfig(
    sample_size=16,
    block_out_channels=(64, 96, 128),
    cross_attention=(False, True, True),
    num_heads=4,
    cross_attention_dim=128,
    norm_num_groups=16,
    coordinates=True,
)
DECODER = TinyDecoderConfig(width=48, num_blocks=(2, 2, 1))


def tokenizer() -> Tokenizer:
    """Word-level tokenizer over the grammar's vocabulary: lower-cased, padded and cut to 16 ids."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = [END, START, UNKNOWN, *vocabulary()]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, words.index(START)), (END, words.index(END))]
    )
    built.enable_truncation(CONTEXT_LENGTH)
    built.enable_padding(length=CONTEXT_LENGTH, pad_id=words.index(END), pad_token=END)
    return built


def config(mean: float, std: float) -> StudentConfig:
    """The student's configuration; the decoder is given `std * latent + mean`."""
    ids = TensorSpec(name="input_ids", shape=(1, CONTEXT_LENGTH), dtype="int32")
    context = TensorSpec(name="context", shape=(1, CONTEXT_LENGTH, TEXT_ENCODER.hidden_size))
    latent = TensorSpec(name="latent", shape=LATENT_SHAPE)
    return StudentConfig(
        name="shapes",
        task="text-to-image",
        components={
            "text_encoder": ComponentConfig(
                architecture="clip_text", config=TEXT_ENCODER.model_dump(), inputs=(ids,), outputs=(context,)
            ),
            "denoiser": ComponentConfig(
                architecture="unet",
                config=DENOISER.model_dump(),
                inputs=(latent, TensorSpec(name="timestep", shape=(1,)), context),
                outputs=(TensorSpec(name="prediction", shape=LATENT_SHAPE),),
            ),
            "decoder": ComponentConfig(
                architecture="tiny_decoder",
                config=DECODER.model_dump(),
                inputs=(latent,),
                outputs=(TensorSpec(name="image", shape=(1, 3, 64, 64)),),
            ),
        },
        sampler=SamplerConfig(
            scheduler="flow_match_euler",
            prediction_type="velocity",
            times={1: (1.0,), 2: (1.0, 0.5), 4: (1.0, 0.75, 0.5, 0.25)},
            default_steps=4,
        ),
        latent=LatentConfig(shape=LATENT_SHAPE, scale=std, shift=mean),
        example_prompts=(
            "a small red circle left of a large blue square",
            "a large yellow triangle in the center",
            "a small green square above a large purple circle",
            "a large orange circle in the bottom right",
        ),
    )


def write_weights(folder: Path, modules: Mapping[str, nn.Module], mean: float, std: float) -> None:
    """Write `shapes.safetensors` (fp16), `shapes.json` (its config) and `tokenizer.json` into `folder`."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": value.to(torch.float16).contiguous()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    save_file(tensors, folder / "shapes.safetensors")
    (folder / "shapes.json").write_text(config(mean, std).model_dump_json(indent=2) + "\n")
    tokenizer().save(str(folder / "tokenizer.json"))
