"""The int8 benchmarks' rows of Apple's own tools: coremltools on the plain package, coreai-opt on the module.

What coremltools makes is computed by edgegen's evaluator of ML programs, what coreai-opt makes by Core AI's CPU
runtime: neither is a latency of a device, so none is given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from int8_ours import Ours
from int8_rows import Failed, Made, first_line, runner

from edgegen.graph.tensor_spec import TensorSpec


def coreml(ours: Ours, folder: Path) -> Iterator[Made | Failed]:
    """coremltools' 8-bit weights, as `linear_quantize_weights` and `palettize_weights` have them by default."""
    import coremltools as ct
    from coremltools.optimize import coreml as cto

    request, plain = ours.plain
    linear = cto.OptimizationConfig(global_config=cto.OpLinearQuantizerConfig(mode="linear_symmetric"))
    table = cto.OptimizationConfig(global_config=cto.OpPalettizerConfig(mode="kmeans", nbits=8))
    recipes = {
        "coremltools, linear w8": lambda model: cto.linear_quantize_weights(model, linear),
        "coremltools, w8 palette": lambda model: cto.palettize_weights(model, table),
    }
    for place, (row, compress) in enumerate(recipes.items()):
        started = time.perf_counter()
        try:
            made = compress(ct.models.MLModel(str(plain), skip_model_load=True))
            path = folder / f"theirs-{place}.mlpackage"
            made.save(str(path))
            seconds = time.perf_counter() - started
            run = runner(ours.subject, "coreml", path, request)
            run(ours.subject.held_out[0])
        except Exception as error:
            yield Failed(row, f"fails: {first_line(error)}")
            continue
        yield Made(row, path, run, seconds, note="weights only")


def coreai(ours: Ours, folder: Path) -> Iterator[Made | Failed]:
    """coreai-opt's w8 preset, and its default: int8 weights and activations, calibrated."""
    from coreai_opt.quantization import QuantizerConfig

    recipes = {
        "coreai-opt, w8 preset": (QuantizerConfig.presets.w8, "weights only"),
        "coreai-opt, default": (QuantizerConfig, "weights and activations"),
    }
    for place, (row, (config, note)) in enumerate(recipes.items()):
        started = time.perf_counter()
        try:
            path = folder / f"theirs-{place}.aimodel"
            _coreai_opt(ours, config(), path)
            seconds = time.perf_counter() - started
            run = runner(ours.subject, "coreai", path, ours.plain[0])
            run(ours.subject.held_out[0])
        except Exception as error:
            yield Failed(row, f"fails: {first_line(error)}")
            continue
        yield Made(row, path, run, seconds, note=note)


def _coreai_opt(ours: Ours, config: object, path: Path) -> None:
    """The module through coreai-opt's quantizer, as its guide has it, to an asset at `path`."""
    import coreai_opt
    from coreai_opt.quantization import Quantizer
    from coreai_torch import TorchConverter, get_decomp_table

    subject, request = ours.subject, ours.plain[0]
    quantizer = Quantizer(subject.module, config)
    example = tuple(subject.calibration[0].values())
    prepared = quantizer.prepare(example)
    with torch.no_grad(), quantizer.calibration_mode():
        for given in subject.calibration:
            prepared(*given.values())
    final = quantizer.finalize(backend=coreai_opt.ExportBackend.CoreAI)
    with torch.no_grad():
        program = torch.export.export(final, example).run_decompositions(get_decomp_table())
    names = _names(request.inputs), _names(request.outputs)
    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE).add_exported_program(
        program, input_names=names[0], output_names=names[1], entrypoint_name="main"
    )
    converter.to_coreai().save_asset(path)


def _names(specs: tuple[TensorSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]
