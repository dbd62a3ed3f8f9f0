"""A `.pt2` with an opaque constant, which torch unpickles whatever it is."""

import pickle
from pathlib import Path

import torch
from craft import Touch, edit_json, honest_pt2, main, rewrite

EXIT, FINDS = 5, "pickled object"


def make(path: Path, canary: Path) -> None:
    def opaque(document: dict) -> None:
        document["config"]["thing"] = {
            "path_name": "opaque_obj_0",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }

    edits = {"data/constants/model_constants_config.json": edit_json(opaque)}
    extra = {"data/constants/opaque_obj_0": pickle.dumps(Touch(canary))}
    path.write_bytes(rewrite(honest_pt2(), edits, extra))


def naive(path: Path, canary: Path) -> None:
    torch.export.load(path)


if __name__ == "__main__":
    main(make)
