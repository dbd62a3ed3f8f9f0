"""`manifest.json`: everything an app needs to run a bundle, and where every byte of it came from. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import Delegation, Precision
from edgegen.students.config import LatentConfig
from edgegen.students.sampler import SamplerConfig, SamplerStep

SCHEMA_VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Model):
    """A file of the bundle. Directories (.mlpackage, .aimodel) are listed file by file."""

    sha256: str
    bytes: int


class Artifact(_Model):
    """One component lowered by one backend; `path` is relative to the bundle, a file or a package directory."""

    backend: str
    component: str
    path: str
    precision: Precision
    bytes: int
    delegation: Delegation
    details: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    executed: bool
    """Whether verification ran this very artifact on the building host."""
    not_executed_because: str | None = None


class ComponentIO(_Model):
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class SamplerTable(_Model):
    """`tables[steps]` holds the folded coefficients; `config` is what they were derived from."""

    config: SamplerConfig
    default_steps: int
    tables: dict[int, tuple[SamplerStep, ...]]


class NoiseSpec(_Model):
    """Noise stream: draw `i` of stream `s` for a seed is fixed by `generator`; stream 0 is the initial latent, stream k
    (k >= 1) the fresh noise after step k."""

    generator: Literal["philox4x32-10/as241"] = "philox4x32-10/as241"
    order: Literal["C"] = "C"


class Fixture(_Model):
    """Paths (relative to the bundle) of .npy files; `latents` holds the latent after each step."""

    prompt: str
    seed: int
    steps: int
    input_ids: str
    noise: str
    latents: tuple[str, ...]
    picture: str


class Gates(_Model):
    """Thresholds per precision that the artifacts were held to."""

    sqnr_db: dict[str, float]
    picture_psnr_db: dict[str, float]
    sensitivity_tolerance: float
    require_full_delegation: bool = False


class Manifest(_Model):
    schema_version: Literal[1] = 1
    name: str
    task: Literal["text-to-image", "single"]
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
    sampler: SamplerTable | None = None
    latent: LatentConfig | None = None
    noise: NoiseSpec | None = None
    tokenizer: str | None = None
    example_prompts: tuple[str, ...] = ()
    fixtures: tuple[Fixture, ...] = ()
    gates: Gates
    files: dict[str, FileEntry]
    """Every file except manifest.json, reports/ and report.html; paths are POSIX, relative, sorted."""
