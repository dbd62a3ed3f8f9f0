"""Small pipelines of diffusers, one a class, with random weights and word tokenizers, saved by their own code."""

import json
import shutil

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WORDS = ["a", "red", "car", "on", "street", "photograph", "of", "cat", "blue", "house", "by", "the", "sea", "user"]
CHAT = "{{ '<|im_start|>user\n' + messages[0]['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}"


def word_tokenizer(length, pad, *, before=(), after=("<|endoftext|>",), special=(), chat=None):
    """One id a word; `before` and `after` go around every prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = list(dict.fromkeys(["!", "<unk>", *WORDS, pad, *before, *after, *special]))
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([name for name in names if name.startswith("<")])
    pieces = " ".join([*before, "$A", *after])
    ids = [(name, names.index(name)) for name in (*before, *after)]
    if ids:
        tokenizer.post_processor = processors.TemplateProcessing(single=pieces, pair=f"{pieces} $B", special_tokens=ids)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, pad_token=pad, unk_token="<unk>", padding_side="right"
    )
    made.chat_template = chat
    return made


def clip(width, layers, tokenizer, projection=None):
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        hidden_act="gelu" if projection else "quick_gelu",
        projection_dim=projection or 8,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    return kind(config)


def kl(latent=4, **more):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=latent,
        **more,
    )


UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
}
TURBO = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
}
NOTHING = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stable_diffusion():
    tokenizer = word_tokenizer(12, "!")
    return diffusers.StableDiffusionPipeline(
        vae=kl(),
        text_encoder=clip(16, 2, tokenizer),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.EulerDiscreteScheduler(**TURBO),
        **NOTHING,
    )


def latent_consistency():
    tokenizer = word_tokenizer(12, "!")
    return diffusers.LatentConsistencyModelPipeline(
        vae=kl(),
        text_encoder=clip(16, 2, tokenizer),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=16),
        scheduler=diffusers.LCMScheduler(),
        **NOTHING,
    )


def stable_diffusion_xl():
    first, second = word_tokenizer(12, "<|endoftext|>"), word_tokenizer(12, "!", special=("<|endoftext|>",))
    sized = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    sized |= {"projection_class_embeddings_input_dim": 6 * 4 + 12, "transformer_layers_per_block": (1, 2)}
    return diffusers.StableDiffusionXLPipeline(
        vae=kl(scaling_factor=0.13025),
        text_encoder=clip(16, 3, first),
        text_encoder_2=clip(8, 2, second, projection=12),
        tokenizer=first,
        tokenizer_2=second,
        unet=diffusers.UNet2DConditionModel(**{**UNET, "cross_attention_dim": 24}, **sized),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**TURBO),
        add_watermarker=False,
    )


def stable_diffusion_3():
    first, second = word_tokenizer(12, "<|endoftext|>"), word_tokenizer(12, "!", special=("<|endoftext|>",))
    return diffusers.StableDiffusion3Pipeline(
        vae=kl(8, shift_factor=0.06, scaling_factor=1.5, use_post_quant_conv=False, use_quant_conv=False),
        text_encoder=clip(16, 2, first, projection=12),
        text_encoder_2=clip(8, 2, second, projection=4),
        text_encoder_3=None,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=None,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sana_sprint():
    tokenizer = word_tokenizer(300, "<pad>", before=("<bos>",), after=())
    blocks = {"encoder_block_types": ("ResBlock", "EfficientViTBlock")}
    blocks |= {name.replace("encoder", "decoder"): value for name, value in blocks.items()}
    qkv = {"encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,))}
    return diffusers.SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma2Model(
            transformers.Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                query_pre_attn_scalar=8,
            )
        ),
        vae=diffusers.AutoencoderDC(
            latent_channels=8,
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            attention_head_dim=8,
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
            scaling_factor=0.41407,
            **blocks,
            **qkv,
        ),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=16,
            patch_size=1,
            guidance_embeds=True,
            qk_norm="rms_norm_across_heads",
        ),
        scheduler=diffusers.SCMScheduler(sigma_data=0.5),
    )


def pixart(kind, length, **sized):
    tokenizer = word_tokenizer(length, "<pad>", after=("</s>",))
    return kind(
        tokenizer=tokenizer,
        text_encoder=transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=len(tokenizer),
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        ),
        vae=kl(),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            cross_attention_dim=32,
            sample_size=8,
            caption_channels=16,
            norm_num_groups=8,
            **sized,
        ),
        scheduler=diffusers.DDIMScheduler(**TURBO, clip_sample=False),
    )


def z_image():
    tokenizer = word_tokenizer(
        512, "<|endoftext|>", after=(), special=("<|im_start|>", "<|im_end|>", "assistant"), chat=CHAT
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl(4, sample_size=16, shift_factor=0.1, scaling_factor=0.36),
        text_encoder=transformers.Qwen3Model(
            transformers.Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                rope_theta=5000.0,
            )
        ),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[600, 32, 32],
        ),
    )


def super_resolution():
    return diffusers.LDMSuperResolutionPipeline(
        vqvae=diffusers.VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            num_vq_embeddings=32,
        ),
        unet=diffusers.UNet2DModel(
            sample_size=8,
            in_channels=6,
            out_channels=3,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        ),
        scheduler=diffusers.DDIMScheduler(**TURBO, clip_sample=False),
    )


MADE = {
    "super-resolution": (super_resolution, {}),
    "sd": (stable_diffusion, {"guidance_scale": 0.0}),
    "lcm": (latent_consistency, {}),
    "sdxl": (stable_diffusion_xl, {"guidance_scale": 0.0}),
    "sd3": (stable_diffusion_3, {"guidance_scale": 0.0}),
    "sana-sprint": (
        sana_sprint,
        {"use_resolution_binning": False, "height": 32, "width": 32, "intermediate_timesteps": None},
    ),
    "pixart-alpha": (
        lambda: pixart(diffusers.PixArtAlphaPipeline, 120),
        {"guidance_scale": 1.0, "use_resolution_binning": False},
    ),
    "pixart-sigma": (
        lambda: pixart(diffusers.PixArtSigmaPipeline, 300),
        {"guidance_scale": 1.0, "use_resolution_binning": False},
    ),
    "z-image": (z_image, {"guidance_scale": 0.0, "height": 16, "width": 16}),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Name -> the pipeline, what it is called with, and the folder it wrote; each made when it is first asked for."""
    known = {}

    @torch.no_grad()
    def get(name):
        if name not in known:
            make, call = MADE[name]
            torch.manual_seed(0)
            pipeline = make()
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module):
                    for key, parameter in part.eval().named_parameters():
                        # Zeros and ones of norms and gates would let a mistake there pass.
                        if parameter.ndim == 1 or "pad_token" in key:
                            parameter.add_(0.1 * torch.randn_like(parameter))
                        if key == "quantize.embedding.weight":
                            parameter.normal_()  # near zero at first, where one code would serve for every place
            folder = tmp_path_factory.mktemp("pipelines") / name
            pipeline.save_pretrained(folder, safe_serialization=True)
            pipeline.set_progress_bar_config(disable=True)
            known[name] = (pipeline, call, folder)
        return known[name]

    return get


@pytest.fixture
def copied(saved, tmp_path):
    """The folder of a pipeline, to be spoiled."""
    return lambda name: shutil.copytree(saved(name)[2], tmp_path / name)


@pytest.fixture
def edit():
    def change(path, **changes):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change
