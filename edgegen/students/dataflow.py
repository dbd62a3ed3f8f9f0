"""What flows between the components of a student: held against the task before anything runs. Imports no torch.

    conditioning component (once) -> denoiser (once a step) -> decoder (once)

The denoiser's inputs are found by name: `latent`, `timestep`, outputs of the conditioning component, and the scalars of
`conditions`.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.config import TASKS, StudentConfig

LATENT, TIMESTEP, STEP = "latent", "timestep", "step"
PICTURES = {"image": 4, "video": 5}
"""Output of a decoder -> its rank: [1, 3, H, W] or [1, 3, T, H, W], both in -1..1."""


def known_inputs(config: StudentConfig) -> Mapping[str, TensorSpec]:
    """Everything that a denoiser of this student may ask for."""
    assert config.conditioning is not None and config.latent is not None
    return {
        LATENT: TensorSpec(name=LATENT, shape=config.latent.shape),
        TIMESTEP: TensorSpec(name=TIMESTEP, shape=(1,)),
        **{spec.name: spec for spec in config.components[config.conditioning].outputs},
        **{name: TensorSpec(name=name, shape=(1,)) for name in config.conditions},
    }


def check_flow(config: StudentConfig, name: str) -> None:
    """EdgegenError for components that are not the task's, and for the first input that nothing gives."""
    expected = TASKS[config.task]
    if tuple(config.components) != expected:
        wanted, found = (", ".join(f"`{part}`" for part in parts) for parts in (expected, config.components))
        raise EdgegenError(f"task {config.task} of `{name}` needs components {wanted}, in this order, not {found}")
    if config.conditioning is None:
        return
    for key in ("sampler", "latent"):
        if getattr(config, key) is None:
            raise EdgegenError(f"config of `{name}` has no `{key}`, which task {config.task} needs")
    assert config.latent is not None
    if len(config.latent.shape) not in (4, 5) or config.latent.shape[0] != 1:
        raise EdgegenError(
            f"latent {list(config.latent.shape)} of `{name}` is neither [1, C, H, W] nor [1, C, T, H, W]"
        )
    _check_conditioning(config, name)
    _check_denoiser(config, name)
    _check_decoder(config, name)


def _check_conditioning(config: StudentConfig, name: str) -> None:
    assert config.conditioning is not None
    part = config.components[config.conditioning]
    text = config.conditioning == "text_encoder"
    wanted = "`input_ids` int32 [1, L]" if text else "`image` float32 [1, 3, H, W]"
    found = part.inputs[0] if len(part.inputs) == 1 else None
    fits = found is not None and (
        (found.name == "input_ids" and found.dtype == "int32" and len(found.shape) == 2 and found.shape[0] == 1)
        if text
        else (
            found.name == "image" and found.dtype == "float32" and len(found.shape) == 4 and found.shape[:2] == (1, 3)
        )
    )
    if not fits:
        raise EdgegenError(f"`{config.conditioning}` of `{name}` must take {wanted} and nothing else")
    taken = {LATENT, TIMESTEP, STEP}
    for kind, names in (("output", [spec.name for spec in part.outputs]), ("condition", list(config.conditions))):
        for one in names:
            if one in taken:
                raise EdgegenError(f"{kind} `{one}` of `{name}` has a name that is something else's")
            taken.add(one)


def _check_denoiser(config: StudentConfig, name: str) -> None:
    assert config.latent is not None
    known, part = known_inputs(config), config.components["denoiser"]
    for spec in part.inputs:
        if spec.name not in known:
            raise EdgegenError(
                f"the denoiser of `{name}` takes `{spec.name}`, which nothing gives; it can have "
                + ", ".join(f"`{one}`" for one in known),
                hint=f'a scalar is declared as `"conditions": {{"{spec.name}": 0.0}}` in the config',
            )
        if spec != known[spec.name]:
            given, asked = (f"{one.dtype} {list(one.shape)}" for one in (known[spec.name], spec))
            raise EdgegenError(f"the denoiser of `{name}` takes `{spec.name}` as {asked}, and is given {given}")
    if LATENT not in {spec.name for spec in part.inputs}:
        raise EdgegenError(f"the denoiser of `{name}` does not take `{LATENT}`")
    if [spec.shape for spec in part.outputs] != [config.latent.shape]:
        raise EdgegenError(
            f"the denoiser of `{name}` gives {[list(spec.shape) for spec in part.outputs]}, not one tensor shaped as "
            f"its latent, {list(config.latent.shape)}"
        )


def _check_decoder(config: StudentConfig, name: str) -> None:
    assert config.latent is not None
    part = config.components["decoder"]
    if [spec.shape for spec in part.inputs] != [config.latent.shape]:
        raise EdgegenError(
            f"the decoder of `{name}` takes {[list(spec.shape) for spec in part.inputs]}, not the latent "
            f"{list(config.latent.shape)}"
        )
    out = part.outputs[0] if len(part.outputs) == 1 else None
    wanted = "video" if config.task == "image-to-video" else "image"
    if out is None or out.name != wanted or len(out.shape) != PICTURES[wanted] or out.shape[:2] != (1, 3):
        shape = "[1, 3, T, H, W]" if wanted == "video" else "[1, 3, H, W]"
        raise EdgegenError(f"the decoder of `{name}` must give one output, `{wanted}` {shape}")
