"""diffusers' `scheduler_config.json` as a `SamplerConfig`: where the algebra is the same, and a refusal where it is
not.

What is here draws the same picture as diffusers' own loop for the step counts it offers; a test holds them together.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from edgegen.errors import EdgegenError
from edgegen.students.sampler import SamplerConfig

log = logging.getLogger(__name__)

STEPS = (1, 2, 4, 8)
DEFAULT_STEPS = 4
LCM_SIGMA_DATA = 0.5
SCM_START, SCM_MIDDLE = 1.57080, 1.3
"""diffusers' own defaults of SCMScheduler: where sampling starts, and the middle of two steps."""

OFF = {
    "trained_betas": None,
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
}
"""Settings that change the arithmetic beyond what a table of coefficients can say, with the value that leaves it
alone.
"""

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True, "timestep_spacing": "leading", "set_alpha_to_one": True},
    "LCMScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace", "final_sigmas_type": "zero"},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "linspace", "final_sigmas_type": "zero"},
    "TCDScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "DEISMultistepScheduler": {"timestep_spacing": "linspace", "solver_order": 2},
    "FlowMatchEulerDiscreteScheduler": {"shift": 1.0},
    "SCMScheduler": {"prediction_type": "trigflow"},
}
"""Schedulers that are read, and diffusers' defaults for keys that a file may leave out."""

INSTEAD = {
    "DPMSolverMultistepScheduler": "EulerDiscreteScheduler",
    "DPMSolverSinglestepScheduler": "EulerDiscreteScheduler",
    "UniPCMultistepScheduler": "EulerDiscreteScheduler",
    "PNDMScheduler": "DDIMScheduler",
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
}
"""Schedulers whose step looks at more than one prediction, which a row of coefficients cannot; and the one to use."""

SHARED: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "steps_offset": 0,
}


@dataclass(frozen=True)
class FlowSpacing:
    """How a pipeline asks a flow scheduler for its sigmas: what its `scheduler_config.json` does not say."""

    even: bool = False
    """From 1 to 1 / steps, as Z-Image's pipeline does; otherwise down to the scheduler's own last sigma."""
    tokens: int | None = None
    """Tokens of the picture, which set the shift where `use_dynamic_shifting` is on."""


def sampler_from(data: Mapping[str, Any], name: str, spacing: FlowSpacing | None = None) -> SamplerConfig:
    """The sampler that `scheduler_config.json` describes, for the step counts 1, 2, 4 and 8 where it has them.

    Raises EdgegenError for a scheduler that is not read, and for the first setting that changes its arithmetic.
    """
    kind = str(data.get("_class_name"))
    if kind not in DEFAULTS:
        raise EdgegenError(
            f"scheduler `{kind}` in `{name}` is not one that edgegen reads",
            hint=_instead(kind),
        )
    settings = SHARED | DEFAULTS[kind] | dict(data)
    for key, neutral in OFF.items():
        value = settings.get(key, neutral)
        if value != neutral and not (not value and not neutral):
            raise EdgegenError(
                f"scheduler `{kind}` in `{name}` has `{key}` {value!r}, which a folded schedule cannot follow",
                hint=f"save the pipeline with `{key}={neutral}`, as few-step students are sampled",
            )
    try:
        train = int(settings["num_train_timesteps"])
        if not 2 <= train <= 100_000:
            raise ValueError(f"num_train_timesteps {train}")
        build: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
            "DDIMScheduler": _ddim,
            "LCMScheduler": _lcm,
            "EulerDiscreteScheduler": _euler,
            "EulerAncestralDiscreteScheduler": _euler,
            "TCDScheduler": _tcd,
            "DEISMultistepScheduler": _deis,
            "FlowMatchEulerDiscreteScheduler": lambda read, train: _flow(read, train, spacing or FlowSpacing()),
            "SCMScheduler": _scm,
        }
        made = build[kind](settings, train)
        if not made["times"]:
            raise EdgegenError(
                f"scheduler `{kind}` in `{name}` with spacing `{settings.get('timestep_spacing')}` has no step count "
                f"among {STEPS} whose steps fall on training timesteps",
                hint="save the pipeline with `timestep_spacing='trailing'`",
            )
        made["default_steps"] = max(steps for steps in made["times"] if steps <= DEFAULT_STEPS)
        _say_a_late_start(kind, settings, made)
        return SamplerConfig.model_validate({"num_train_timesteps": train, **made})
    except ValidationError as error:
        first = error.errors()[0]
        raise EdgegenError(f"scheduler `{kind}` in `{name}` does not fit: {first['msg']}", hint=_hint()) from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise EdgegenError(
            f"scheduler `{kind}` in `{name}` has an impossible setting: {error}", hint=_hint()
        ) from error


def _instead(kind: str) -> str:
    if kind not in INSTEAD:
        return "save the pipeline with one of " + ", ".join(f"`{known}`" for known in DEFAULTS)
    spacing = "" if kind.startswith("FlowMatch") else ", timestep_spacing='trailing'"
    return (
        f"`pipeline.scheduler = diffusers.{INSTEAD[kind]}.from_config(pipeline.scheduler.config{spacing})` before "
        "`pipeline.save_pretrained(folder)`"
    )


def _say_a_late_start(kind: str, settings: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Steps from nothing but noise belong at the last timestep; `leading`, the usual default, is far from it where
    steps are few. diffusers draws so too: it is said, and followed."""
    steps, train = made["default_steps"], int(settings["num_train_timesteps"])
    first = made["times"][steps][0]
    if "beta_schedule" in made and settings.get("timestep_spacing") == "leading" and first < 0.9 * train:
        log.warning(
            "the scheduler's `timestep_spacing` leading starts %d steps from noise at timestep %d of %d: few-step "
            "students are made for `trailing`, `%s.from_config(pipeline.scheduler.config, timestep_spacing='trailing')`"
            ", or say their times: `--timesteps 999,749,499,249`",
            steps,
            first,
            train,
            kind,
        )


def _hint() -> str:
    return "save the pipeline again with `pipeline.save_pretrained(folder)`"


def _vp(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("beta_schedule", "beta_start", "beta_end", "prediction_type")}


def _spaced(settings: dict[str, Any], train: int, steps: int) -> list[int]:
    """`leading` and `trailing` of Lin et al. 2024 (arXiv 2305.08891, table 2), as diffusers rounds them."""
    spacing, offset = settings["timestep_spacing"], int(settings["steps_offset"])
    if spacing == "leading":
        times = [i * (train // steps) + offset for i in reversed(range(steps))]
    elif spacing == "trailing":
        times = [round(train - i * train / steps) - 1 for i in range(steps)]
    else:
        return []
    return times if all(0 <= t < train for t in times) else []


def _ddim(settings: dict[str, Any], train: int) -> dict[str, Any]:
    """DDIM steps back by a fixed stride; a spacing whose neighbours are that stride apart is a table's spacing."""
    times = {}
    for steps in STEPS:
        row, stride = _spaced(settings, train, steps), train // steps
        if row and all(a - b == stride for a, b in itertools.pairwise(row)) and row[-1] < stride:
            times[steps] = row
    final = "one" if settings["set_alpha_to_one"] else "first"
    return {"scheduler": "ddim", "times": times, "final_alpha": final, **_vp(settings)}


def _lcm(settings: dict[str, Any], train: int) -> dict[str, Any]:
    """Luo et al. 2023 (arXiv 2310.04378): evenly chosen from the distillation's own timesteps, last step to x0."""
    original = int(settings.get("original_inference_steps", 50))
    scaling = float(settings.get("timestep_scaling", 10.0))
    stride = train // original
    own = [i * stride - 1 for i in range(original, 0, -1)]
    times = {}
    for steps in STEPS:
        if steps > original:
            continue
        row = [own[math.floor(i * original / steps)] for i in range(steps)]
        # c_skip, the boundary condition's share of the input, must be too small for fp32 to notice.
        skip = LCM_SIGMA_DATA**2 / ((row[-1] * scaling) ** 2 + LCM_SIGMA_DATA**2)
        if skip < 1e-6:
            times[steps] = row
    return {"scheduler": "lcm", "times": times, "final_alpha": "one", **_vp(settings)}


def _euler(settings: dict[str, Any], train: int) -> dict[str, Any]:
    """Karras et al. 2022 (arXiv 2206.00364): in x / sqrt(1 + sigma^2), an Euler step from sigma to sigma is DDIM's
    step.

    `leading` starts from unit noise; the other spacings start from sigma * noise, sqrt(1 - alpha-bar) in these units.
    """
    times: dict[int, list[int]] = {}
    for steps in STEPS:
        if settings["timestep_spacing"] == "linspace":
            row = [(train - 1) * i / (steps - 1) for i in reversed(range(steps))] if steps > 1 else []
            if not all(value.is_integer() for value in row):
                continue
            times[steps] = [int(value) for value in row]
        else:
            times[steps] = _spaced(settings, train, steps)
    if settings["final_sigmas_type"] != "zero":
        raise ValueError(f"final_sigmas_type {settings['final_sigmas_type']}, which ends off the decoder's scale")
    ancestral = settings["_class_name"] == "EulerAncestralDiscreteScheduler"
    made = {
        "scheduler": "euler_ancestral" if ancestral else "ddim",
        "times": {steps: row for steps, row in times.items() if row},
        "final_alpha": "one",
        **_vp(settings),
    }
    if ancestral and settings["prediction_type"] == "sample":
        raise ValueError("prediction_type sample, which diffusers' own ancestral Euler does not implement")
    if settings["timestep_spacing"] != "leading" and made["times"]:
        steps = min(made["times"])
        whole = SamplerConfig.model_validate({"num_train_timesteps": train, "default_steps": steps, **made})
        made["initial_scale"] = math.sqrt(1 - whole.alpha_bars()[-1])
    return made


def _deis(settings: dict[str, Any], train: int) -> dict[str, Any]:
    """Zhang and Chen 2022 (arXiv 2204.13902): its first-order step is DDIM's, and a single step is always
    first-order.
    """
    times = {}
    for steps in STEPS if int(settings["solver_order"]) == 1 else (1,):
        if settings["timestep_spacing"] == "linspace":
            row = [round((train - 1) * i / steps) for i in range(steps, 0, -1)]
        elif settings["timestep_spacing"] == "leading":
            row = [i * (train // (steps + 1)) + int(settings["steps_offset"]) for i in range(steps, 0, -1)]
        else:
            row = _spaced(settings, train, steps)
        if row and all(0 <= t < train for t in row):
            times[steps] = row
    return {"scheduler": "ddim", "times": times, "final_alpha": "first", **_vp(settings)}


def _tcd(settings: dict[str, Any], train: int) -> dict[str, Any]:
    """Zheng et al. 2024 (arXiv 2402.19159) with eta 0, which is what diffusers' pipelines ask for: DDIM's step between
    the distillation's own timesteps.
    """
    made = _lcm({**settings, "timestep_scaling": 1e6}, train)
    return {**made, "scheduler": "ddim", "final_alpha": "first"}


def _scm(settings: dict[str, Any], train: int) -> dict[str, Any]:
    """Continuous-time consistency (Lu and Song 2024, arXiv 2410.11081) at the angles of diffusers' SANA-Sprint."""
    if settings["prediction_type"] != "trigflow":
        raise ValueError(f"prediction_type {settings['prediction_type']}, where SCM has trigflow alone")
    times = {steps: [SCM_START * (steps - i) / steps for i in range(steps)] for steps in STEPS}
    times[2] = [SCM_START, SCM_MIDDLE]
    return {"scheduler": "scm", "prediction_type": "trigflow", "times": times}


def _flow(settings: dict[str, Any], train: int, spacing: FlowSpacing) -> dict[str, Any]:
    """Esser et al. 2024 (arXiv 2403.03206): evenly spaced between the ends, then shifted.

    A constant shift has shifted the ends already, unless the pipeline brings its own.
    """
    shift, dynamic = float(settings["shift"]), bool(settings.get("use_dynamic_shifting", False))
    if dynamic:
        if spacing.tokens is None:
            raise ValueError("use_dynamic_shifting, where the pipeline does not say what it depends on")
        shift = _dynamic_shift(settings, spacing.tokens)

    def shifted(sigma: float) -> float:
        return shift * sigma / (1 + (shift - 1) * sigma)

    low = 1 / train if dynamic else shifted(1 / train)
    times = {}
    for steps in STEPS:
        last = 1 / steps if spacing.even else low
        times[steps] = [shifted(1.0 + (last - 1.0) * i / max(steps - 1, 1)) for i in range(steps)]
    return {"scheduler": "flow_match_euler", "prediction_type": "velocity", "times": times}


def _dynamic_shift(settings: dict[str, Any], tokens: int) -> float:
    """The shift for a picture of that many tokens: linear in them, or its exponential."""
    first, last = float(settings.get("base_shift", 0.5)), float(settings.get("max_shift", 1.15))
    few, many = int(settings.get("base_image_seq_len", 256)), int(settings.get("max_image_seq_len", 4096))
    mu = first + (last - first) / (many - few) * (tokens - few)
    return math.exp(mu) if settings.get("time_shift_type", "exponential") == "exponential" else mu
