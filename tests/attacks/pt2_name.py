"""A `.pt2` with an input whose name is Python source: torch writes names into the code that it generates."""

from pathlib import Path

import torch
from craft import edit_model, main, source

EXIT, FINDS = 5, "source text"


def make(path: Path, canary: Path) -> None:
    """The input, called `x`, becomes `x=<expression>`: a default argument, evaluated when the function is defined."""
    evil = f"x={source(canary)}"

    def plant(document: dict) -> None:
        graph = document["graph_module"]["graph"]
        graph["tensor_values"][evil] = graph["tensor_values"].pop("x")
        specs = document["graph_module"]["signature"]["input_specs"]
        arguments = [
            *graph["inputs"],
            *(given["arg"] for node in graph["nodes"] for given in node["inputs"]),
            *(spec["user_input"]["arg"] for spec in specs if "user_input" in spec),
        ]
        for argument in arguments:
            if argument.get("as_tensor", {}).get("name") == "x":
                argument["as_tensor"]["name"] = evil

    edit_model(path, plant)


def naive(path: Path, canary: Path) -> None:
    torch.export.load(path)


if __name__ == "__main__":
    main(make)
