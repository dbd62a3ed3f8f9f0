"""A `.pt2` that calls `aten::from_file`: an allowed namespace, and it creates the file it is given."""

from pathlib import Path

import torch
from craft import edit_model, main

EXIT, FINDS = 5, "from_file"


def make(path: Path, canary: Path) -> None:
    def plant(document: dict) -> None:
        node = document["graph_module"]["graph"]["nodes"][-1]
        node["target"] = "torch.ops.aten.from_file.default"
        node["inputs"] = [
            {"name": "filename", "arg": {"as_string": str(canary)}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
            {"name": "size", "arg": {"as_int": 8}, "kind": 1},
        ]

    edit_model(path, plant)


def naive(path: Path, canary: Path) -> None:
    torch.export.load(path).module()(torch.ones(2, 4))


if __name__ == "__main__":
    main(make)
