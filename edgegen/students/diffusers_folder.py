"""A diffusers folder (`model_index.json`) read as data: no class that the folder names is looked up.

A row of `edgegen.students.pipelines.table` says which classes a pipeline may have; each is one of edgegen's own
networks or, by name, one of diffusers' or transformers' that edgegen lists. Every setting that would change the
arithmetic is checked, and is named when it has no place.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from edgegen.errors import EdgegenError
from edgegen.students.archive import read_json
from edgegen.students.assembly import build_student, parse_config
from edgegen.students.example_picture import EXAMPLE_NAMES
from edgegen.students.exported_program import student_name
from edgegen.students.low_rank import IN_FOLDER, Adapter, with_adapters
from edgegen.students.pipelines.decoder import decoder
from edgegen.students.pipelines.files import SAVE_HINT, Part, Shape, inside
from edgegen.students.pipelines.super_resolution import CLASSES, PIPELINE, require_unscaled, super_resolution
from edgegen.students.pipelines.table import PIPELINES, Classes, Pipeline
from edgegen.students.schedulers import FlowSpacing, sampler_from
from edgegen.students.student import Student

log = logging.getLogger(__name__)

PROMPTS = ("a photograph of a cat", "a red car on a street", "a bowl of fruit on a table", "a house by the sea")
LARGE = 20_000_000
"""A decoder with more parameters than this costs more than a few-step denoiser on a phone, and is said."""


def load_folder(folder: Path) -> Student:
    """The student in a diffusers folder, with safetensors weights: it draws from a prompt, or makes a picture larger.

    Raises UnsafeError for pickled weights and for links and names that leave the folder, EdgegenError for a class or a
    setting that edgegen's networks do not have; the message names the key.
    """
    try:
        return _load_folder(folder)
    except EdgegenError as error:
        error.hint = error.hint or SAVE_HINT
        raise


def _load_folder(folder: Path) -> Student:
    index = read_json(inside(folder, "model_index.json"))
    if index.get("_class_name") == PIPELINE:
        student = _picture_to_picture(folder, index)
    else:
        student = _text_to_picture(folder, index)
    if not (folder / IN_FOLDER).exists():
        return student
    log.warning("the folder's own adapter, `%s`, is merged into the weights", IN_FOLDER)
    return with_adapters(student, [Adapter(inside(folder, IN_FOLDER))])


def _text_to_picture(folder: Path, index: Mapping[str, Any]) -> Student:
    row, classes = _row(index)
    scheduler = read_json(inside(folder, "scheduler/scheduler_config.json"))
    text = row.text(folder, classes)
    vae = decoder(folder, classes["vae"])
    denoiser = row.denoiser(folder, classes, vae, text)
    latent = denoiser.latent
    sampler = sampler_from(scheduler, "scheduler_config.json", FlowSpacing(row.even_sigmas, denoiser.tokens))
    context: dict[str, Shape] = {"context": text.part.outputs["context"]}
    if denoiser.extra is not None:
        context[denoiser.extra] = text.part.outputs[denoiser.extra]
    picture = (1, 3, latent[2] * vae.factor, latent[3] * vae.factor)
    config = parse_config(
        {
            "name": student_name(folder.resolve().name),
            "task": "text-to-image",
            "components": {
                "text_encoder": _component(
                    text.part, {"input_ids": (1, text.length)}, text.part.outputs, ("input_ids",)
                ),
                "denoiser": _component(
                    denoiser.part, {"latent": latent, "timestep": (1,), **context}, {"prediction": latent}
                ),
                "decoder": _component(vae.part, {"latent": latent}, {"image": picture}),
            },
            "sampler": sampler.model_dump(mode="json"),
            "latent": {"shape": latent, "scale": vae.scale, "shift": vae.shift},
            "example_prompts": PROMPTS,
        },
        f"{folder.name}/model_index.json",
    )
    network = denoiser.part.config.get("unet") or denoiser.part.config.get("transformer") or {}
    if network.get("time_cond_proj_dim") is not None or network.get("guidance_embeds"):
        log.warning(
            "the denoiser is told its guidance: %g, the default of `%s`; `--guidance` says another",
            denoiser.part.config["guidance_scale"],
            index["_class_name"],
        )
    size = sum(tensor.numel() for tensor in vae.part.state.values())
    if size > LARGE:
        log.warning(
            "the decoder has %.1f M parameters and runs at full resolution: an `AutoencoderTiny` for these latents, "
            "where there is one, draws nearly the same with 1.2 M",
            size / 1e6,
        )
    state = {"text_encoder": text.part.state, "denoiser": denoiser.part.state, "decoder": vae.part.state}
    return build_student(config, state, text.tokenizer, folder.name)


def _picture_to_picture(folder: Path, index: Mapping[str, Any]) -> Student:
    _classes(index, CLASSES)
    scheduler = read_json(inside(folder, "scheduler/scheduler_config.json"))
    parts = super_resolution(folder)
    sampler = sampler_from(scheduler, "scheduler_config.json")
    require_unscaled(sampler)
    latent, side, features = parts.latent, parts.side, parts.encoder.outputs
    large = parts.side * parts.vae.factor
    config = parse_config(
        {
            "name": student_name(folder.resolve().name),
            "task": "image-to-image",
            "components": {
                "image_encoder": _component(parts.encoder, {"image": (1, 3, side, side)}, features),
                "denoiser": _component(
                    parts.denoiser, {"latent": latent, "timestep": (1,), **features}, {"prediction": latent}
                ),
                "decoder": _component(parts.vae.part, {"latent": latent}, {"image": (1, 3, large, large)}),
            },
            "sampler": sampler.model_dump(mode="json"),
            # This pipeline hands its latent to the decoder as it is, whatever `scaling_factor` says.
            "latent": {"shape": latent},
            "example_prompts": EXAMPLE_NAMES,
        },
        f"{folder.name}/model_index.json",
    )
    state = {
        "image_encoder": parts.encoder.state,
        "denoiser": parts.denoiser.state,
        "decoder": parts.vae.part.state,
    }
    return build_student(config, state, None, folder.name)


def _component(
    part: Part, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], integers: tuple[str, ...] = ()
) -> dict[str, Any]:
    def specs(shapes: Mapping[str, Shape]) -> list[dict[str, Any]]:
        return [
            {"name": name, "shape": shape, "dtype": "int32" if name in integers else "float32"}
            for name, shape in shapes.items()
        ]

    return {
        "architecture": part.architecture,
        "config": part.config,
        "inputs": specs(inputs),
        "outputs": specs(outputs),
    }


def _row(index: Mapping[str, Any]) -> tuple[Pipeline, Classes]:
    """The row of the pipeline that `model_index.json` names, and the class of each of its parts."""
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise EdgegenError(
            f"pipeline class `{name}` is not one that edgegen reads",
            hint="it reads " + ", ".join(f"`{known}`" for known in (*PIPELINES, PIPELINE)),
        )
    row = PIPELINES[name]
    return row, _classes(index, row.classes, row.left_out, row.refused)


def _classes(
    index: Mapping[str, Any],
    wanted_classes: Mapping[str, tuple[str, ...]],
    left_out: Collection[str] = (),
    refused: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The class of each part, held against those that the pipeline may have."""
    classes = {}
    for key, value in index.items():
        if key.startswith("_") or key == "scheduler":
            continue
        named = value[1] if isinstance(value, list) and len(value) == 2 else None
        if key in wanted_classes:
            if named not in wanted_classes[key]:
                wanted = " or ".join(f"`{known}`" for known in wanted_classes[key][:2])
                raise EdgegenError(
                    f"`{key}` in model_index.json is `{named}`, and edgegen reads {wanted}", hint=SAVE_HINT
                )
            classes[key] = str(named)
        elif named and key in left_out:
            log.warning("`%s` (`%s`) of the folder is left out: the student is compiled without it", key, named)
        elif named:
            raise EdgegenError(
                f"`{key}` (`{named}`) in model_index.json has no place in a student",
                hint=(refused or {}).get(key, SAVE_HINT),
            )
    for key in wanted_classes:
        if key not in classes:
            raise EdgegenError(f"model_index.json has no `{key}`", hint=SAVE_HINT)
    return classes
