"""A `.pt2` that says one of its weights is pickled, so that torch unpickles it with nothing refused."""

import io
from pathlib import Path

import torch
from craft import Touch, edit_json, honest_pt2, main, rewrite

EXIT, FINDS = 5, "pickled"


def make(path: Path, canary: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Touch(canary), buffer)

    def pickled(document: dict) -> None:
        document["config"]["linear.bias"]["use_pickle"] = True

    edits = {
        "data/weights/model_weights_config.json": edit_json(pickled),
        "data/weights/weight_1": lambda _: buffer.getvalue(),
    }
    path.write_bytes(rewrite(honest_pt2(), edits))


def naive(path: Path, canary: Path) -> None:
    torch.export.load(path)


if __name__ == "__main__":
    main(make)
