"""What onnxruntime makes of a file before it runs it: the graph after its own fusions, on this host's CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

PROVIDER = "CPUExecutionProvider"


def optimised_graph(path: Path) -> Any:
    """An `onnx.GraphProto` without weights. It suits this machine alone, so it is read and thrown away."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        onnxruntime.InferenceSession(str(path), sess_options=options, providers=[PROVIDER])
        return onnx.load(options.optimized_model_filepath, load_external_data=False).graph
