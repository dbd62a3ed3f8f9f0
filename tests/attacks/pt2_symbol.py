"""A `.pt2` with a symbolic size, which sympy evaluates as Python."""

from pathlib import Path

import torch
from craft import edit_model, main, source

EXIT, FINDS = 5, "expr_str"


def make(path: Path, canary: Path) -> None:
    def symbol(document: dict) -> None:
        values = document["graph_module"]["graph"]["tensor_values"]
        expression = {"expr_str": f"({source(canary)} or Integer(2))", "hint": None}
        values["x"]["sizes"][0] = {"as_expr": expression}

    edit_model(path, symbol)


def naive(path: Path, canary: Path) -> None:
    torch.export.load(path)


if __name__ == "__main__":
    main(make)
