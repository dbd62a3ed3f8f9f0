"""Students pruned without healing, through all five backends: what came out, by stage.

    python tools/prune_conformance.py --json docs/prune_conformance.json
    python tools/prune_conformance.py --students snapgen --targets linux-x86 --json /tmp/some.json

Each student is small and has random weights; `edgegen prune --ratio` takes a share of every space of its denoiser and
decoder, and `edgegen build --backend all` builds what is left for each target, every gate as for any other student.
`iphone17` runs all five backends. On a target whose kernels want wide multiples (`linux-x86`) the small decoders may
stay whole. `sd-turbo-attention` is diffusers' `UNet2DConditionModel` with attention in every level and the decoder of
`AutoencoderKL`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conformance import _cells, _edgegen

from edgegen.students.checkpoint import save_pt
from edgegen.students.families.registry import new
from edgegen.students.student import Component, Student

STUDENTS = ("sdxs-512", "snapgen", "mobilei2v", "sd-turbo-attention")
TARGETS = ("iphone17",)


def student(name: str) -> Student:
    """The small student called `name`."""
    if name != "sd-turbo-attention":
        return new(name, "tiny")
    import torch

    from edgegen.students.architectures import build_module

    turbo = new("sd-turbo", "tiny")
    part = turbo.config.components["denoiser"]
    unet = {
        **part.config["unet"],
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    }
    config = part.model_copy(update={"config": {**part.config, "unet": unet}})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_module(config.architecture, config.config)
    components = {**turbo.components, "denoiser": Component("denoiser", module, part.inputs, part.outputs)}
    whole = turbo.config.model_copy(
        update={"name": name, "components": {**turbo.config.components, "denoiser": config}}
    )
    return Student(whole, components, turbo.tokenizer_json)


def run_one(name: str, target: str, ratio: float) -> dict[str, Any]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="edgegen-prune-") as scratch:
        model, small, output = Path(scratch, "model.pt"), Path(scratch, "small.pt"), Path(scratch, "bundle")
        save_pt(student(name), model)
        pruned = _edgegen(
            *("prune", str(model), "--target", target, "--ratio", str(ratio)),
            *("--samples", "2", "-o", str(small)),
        )
        if pruned.returncode:
            return {"student": name, "target": target, "error": pruned.stderr.strip().splitlines()[-3:]}
        built = _edgegen("build", "--target", target, "--backend", "all", "-o", str(output), str(small))
        cells = [one.model_dump() for one in _cells(name, "tiny", target, output, built)]
        said = json.loads(pruned.stdout)["components"]
    shares = {
        key: {what: round(one[what][1] / one[what][0], 3) for what in ("macs", "parameters")}
        for key, one in said.items()
    }
    return {
        "student": name,
        "target": target,
        "ratio": ratio,
        "left": shares,
        "cells": cells,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", default=",".join(STUDENTS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else []
    for name in options.students.split(","):
        for target in options.targets.split(","):
            made = run_one(name, target, options.ratio)
            rows = [one for one in rows if (one["student"], one["target"]) != (name, target)] + [made]
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
            came = [
                f"{one['backend']} {one['outcome']} {one['sqnr_db']} dB {one['reason']}"
                for one in made.get("cells", [])
            ]
            print(name, target, made.get("left"), "; ".join(came) or made.get("error"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
