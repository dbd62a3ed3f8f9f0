"""Families whose networks are diffusers' own: published sizes, and a full-size call where shapes cost no memory."""

import pytest
import torch

from edgegen.students.architectures import build_module
from edgegen.students.dataflow import check_flow
from edgegen.students.families.registry import config_of, parameters
from edgegen.students.student import DTYPES

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PUBLISHED = {
    # family, size, component: parameters, and where the number is from
    ("sd-turbo", "full", "denoiser"): 865_910_724,  # Stable Diffusion 2.1's UNet
    ("sd-turbo", "full", "text_encoder"): 340_387_840,  # OpenCLIP ViT-H without its last layer
    ("sd-turbo", "full", "decoder"): 49_490_199,  # the autoencoder's 83.65 M less its encoder
    ("sdxl-turbo", "full", "denoiser"): 2_567_463_684,
    ("sana-sprint", "full", "denoiser"): 593_501_216,  # "0.6B"
    ("sana-sprint", "1.6b", "denoiser"): 1_610_237_472,  # "1.6B", and 20 x 2240
    ("sana-sprint", "full", "text_encoder"): 2_614_341_888,  # Gemma 2 2B
    ("z-image-turbo", "full", "denoiser"): 6_154_908_736,  # "6B"
    ("pixart", "full", "denoiser"): 611_349_152,  # "0.6B"
    ("pixart", "full", "text_encoder"): 4_762_310_656,  # T5 1.1 XXL's encoder
}


@pytest.mark.parametrize("family", sorted({key[:2] for key in PUBLISHED}), ids=str)
def test_parameters_are_the_published(family):
    found = parameters(config_of(*family))
    wanted = {part: count for (*key, part), count in PUBLISHED.items() if tuple(key) == family}
    assert {part: found[part] for part in wanted} == wanted


def test_stable_diffusion_35_medium_counts_its_table_of_positions():
    """Published as 2.5 B: 2243 M parameters and a table of 384 x 384 positions, which a checkpoint holds as well."""
    config = config_of("sd3.5-flash", "full").components["denoiser"]
    with torch.device("meta"):
        module = build_module(config.architecture, config.config)
    assert sum(p.numel() for p in module.parameters()) == 2_243_171_520
    assert sum(t.numel() for t in module.state_dict().values()) == 2_243_171_520 + 384 * 384 * 1536


FAMILIES = ["sd-turbo", "sdxl-turbo", "sana-sprint", "sd3.5-flash", "z-image-turbo", "pixart"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_size_call_has_the_stated_shapes(name):
    config = config_of(name, "full")
    check_flow(config, name)
    for part in config.components.values():
        with torch.device("meta"), torch.no_grad():
            module = build_module(part.architecture, part.config)
            made = module(*(torch.empty(spec.shape, dtype=DTYPES[spec.dtype]) for spec in part.inputs))
        made = made if isinstance(made, tuple) else (made,)
        assert [tuple(value.shape) for value in made] == [spec.shape for spec in part.outputs]
