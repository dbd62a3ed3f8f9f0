"""`manifest.json`: everything an app needs to run a bundle, and where every byte of it came from. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgegen.bundle.level import LevelChoice
from edgegen.bundle.memory import MemoryPlan
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.graph.tiles import Tiling
from edgegen.lower.backend import Delegation, Precision
from edgegen.lower.mlpackage import FUNCTION_NAME
from edgegen.precision.plan import FrontPoint
from edgegen.students.config import LatentConfig, Task
from edgegen.students.sampler import SamplerConfig, SamplerStep

SCHEMA_VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Model):
    """A file of the bundle. Directories (.mlpackage, .aimodel) are listed file by file."""

    sha256: str
    bytes: int


FunctionName = Annotated[str, Field(pattern=FUNCTION_NAME)]


class Artifact(_Model):
    """One component lowered by one backend; `path` is relative to the bundle, a file or a package directory.

    Artifacts with a `function` may share a `path`: it is a package that holds one function a component.
    """

    backend: str
    component: str
    path: str
    function: FunctionName | None = None
    parts: int = Field(default=1, ge=1)
    """More than one: `path` is a folder with a `chain.json`, the parts and their order (`edgegen.lower.chain`)."""
    precision: Precision
    bytes: int
    """Of all that is at `path`: see `stored_bytes`."""
    delegation: Delegation
    details: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    compressed: dict[str, int] = {}
    """Precision -> how many ops a plan gives it; empty where there is none."""
    passes: tuple[str, ...] = ()
    """The rewrites that were run before lowering, in order, with their options."""
    executed: bool
    """Whether verification ran this very artifact on the building host."""
    executed_by: str | None = None
    """Who ran it there in place of the runtime that it is for; None for that runtime."""
    not_executed_because: str | None = None


def stored_bytes(artifacts: Iterable[Artifact]) -> int:
    """What `artifacts` take together: a package of several functions counts once."""
    return sum({one.path: one.bytes for one in artifacts}.values())


class ComponentIO(_Model):
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class SamplerTable(_Model):
    """`tables[steps]` holds the folded coefficients; `config` is what they were derived from.

    `timesteps` are all that the tables use: a denoiser with an input `step` takes a step's `index` into them, one with
    neither `step` nor `timestep` was folded for the only one there is.
    """

    config: SamplerConfig
    default_steps: int
    tables: dict[int, tuple[SamplerStep, ...]]
    timesteps: tuple[float, ...] = ()


class NoiseSpec(_Model):
    """Noise stream: draw `i` of stream `s` for a seed is fixed by `generator`; stream 0 is the initial latent, stream k
    (k >= 1) the fresh noise after step k."""

    generator: Literal["philox4x32-10/as241"] = "philox4x32-10/as241"
    order: Literal["C"] = "C"


class _Prompted(_Model):
    """`inputs` is what the conditioning component takes for `prompt`: input name -> path."""

    prompt: str
    inputs: Annotated[dict[str, str], Field(min_length=1, max_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _of_text_alone(cls, data: Any) -> Any:
        """Bundles from before students could start from pictures had `input_ids` and `context` as keys."""
        if isinstance(data, dict) and isinstance(data.get("input_ids"), str) and "inputs" not in data:
            data = dict(data)
            data["inputs"] = {"input_ids": data.pop("input_ids")}
            if isinstance(data.get("context"), str) and "conditioning" not in data:
                data["conditioning"] = {"context": data.pop("context")}
        return data


class OtherPrompt(_Prompted):
    """What the denoiser says for another prompt at the same latents: the reference of conditioning sensitivity."""

    predictions: tuple[str, ...]


class Fixture(_Prompted):
    """One picture or video of the reference from prompt to pixels; values are paths, relative to the bundle, of .npy
    files.

    `prompt` is the text, or the name of an example picture. `conditioning` holds the conditioning component's outputs,
    `noise` is the initial latent, `latents` the latent after each step, `predictions` the denoiser's output at each
    step, `image` the decoder's output, and `picture` the same as a PNG: of a video a strip of its frames.
    """

    seed: int
    steps: int
    conditioning: Annotated[dict[str, str], Field(min_length=1)]
    noise: str
    predictions: tuple[str, ...]
    latents: tuple[str, ...]
    image: str
    picture: str
    other: OtherPrompt | None = None


class ComponentFixture(_Model):
    """One call of one component of a student that draws no picture: input and output name -> path of a .npy file."""

    component: str
    label: str
    inputs: dict[str, str]
    outputs: dict[str, str]


class PlanBound(_Model):
    """How well the fake-quant reference of one component is defined, in dB; artifacts are held to it.

    One code that rounds the other way moves every code after it: a deep graph of int8 ops repeats itself only to
    `stability_db` when its float weights move by a millionth, as another order of summation moves values. `float_db` is
    the reference against the float student. Both are the worst over the reference's calls.
    """

    stability_db: float
    float_db: float
    asked_db: float | None = None
    """What an artifact is asked to reach of the fake-quant reference where that repeats itself better; None: what the
    gates ask of every plan."""
    half_db: float | None = None
    """What the reference keeps of its own numbers where float16 rounds what is float between its codes, and so flips
    codes; None in float32."""


class PlanRecord(_Model):
    """The precision plan that was realised: its file, and that of the tensors that its repairs changed."""

    path: str
    tensors: str | None = None
    predicted: dict[str, float] = {}
    repairs: tuple[str, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    """Other plans that could have been chosen."""
    bounds: dict[str, PlanBound] = {}
    """Of the components that it compresses."""
    canonical: dict[str, tuple[str, ...]] = {}
    """Component -> the passes before the plan, the first of each of its artifacts': ops, ranges and repaired tensors
    are of that graph."""


class Gates(_Model):
    """Thresholds per precision that the artifacts were held to."""

    sqnr_db: dict[str, float]
    picture_psnr_db: dict[str, float]
    sensitivity_tolerance: float
    require_full_delegation: bool = False


class Manifest(_Model):
    schema_version: Literal[1] = 1
    name: str
    task: Task
    student_sha256: str
    target: str
    target_sha256: str
    options: dict[str, str]
    tool_versions: dict[str, str]
    components: dict[str, ComponentIO]
    """In the order in which they run."""
    artifacts: tuple[Artifact, ...]
    backends: tuple[str, ...]
    """In the target's order of preference."""
    declined: dict[str, str] = {}
    """Backend -> why this build has no artifact of it."""
    sampler: SamplerTable | None = None
    latent: LatentConfig | None = None
    noise: NoiseSpec | None = None
    tokenizer: str | None = None
    conditions: dict[str, float] = {}
    """Scalar input of the denoiser -> the value that it has unless the user says otherwise."""
    frames_per_second: float | None = Field(default=None, gt=0)
    example_prompts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know of the checkpoint itself."""
    fixtures: tuple[Fixture, ...] = ()
    component_fixtures: tuple[ComponentFixture, ...] = ()
    level: LevelChoice | None = None
    """Of a checkpoint that holds several sizes, or of a student that was held against a latency: what was taken, and
    why."""
    memory: dict[str, MemoryPlan] = {}
    """Backend -> how its artifacts share the device's memory."""
    tilings: dict[str, Tiling] = {}
    """Components whose artifacts compute one tile of what `components` says that they take and give."""
    plan: PlanRecord | None = None
    planned: dict[str, tuple[dict[str, str], ...]] = {}
    """Components that the plan compresses: output -> path of the .npy that the fake-quant reference gives, for every
    call that the fixtures hold, in their order."""
    gates: Gates
    files: dict[str, FileEntry]
    """Every file except manifest.json, reports/ and report.html; paths are POSIX, relative, sorted."""
