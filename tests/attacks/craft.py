"""What the attack scripts share: a payload that leaves a canary, surgery on `.pt2` archives, and a command line."""

import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


class Touch:
    """Unpickling this creates the canary; the pickle itself names `builtins.exec` only."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return exec, (source(self.canary),)


def source(canary: Path) -> str:
    """A Python expression, without line breaks, that creates the canary."""
    return f"open({str(canary)!r}, 'w').close()"


class Doubler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * 2


def honest_pt2() -> bytes:
    """A good `.pt2`, to be operated on."""
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Doubler().eval(), (torch.ones(2, 4),)), buffer)
    return buffer.getvalue()


def rewrite(data: bytes, edits: dict[str, Callable[[bytes], bytes]], extra: dict[str, bytes] | None = None) -> bytes:
    """The archive with some entries rewritten and others added; names are below the archive's root."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            content = old.read(name)
            edit = edits.get(name.removeprefix(f"{root}/"))
            new.writestr(name, edit(content) if edit else content)
        for name, content in (extra or {}).items():
            new.writestr(f"{root}/{name}", content)
    return made.getvalue()


def edit_json(change: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    return edit


def edit_model(path: Path, change: Callable[[dict], None]) -> None:
    """Write a good `.pt2` to `path`, its graph document changed in place."""
    path.write_bytes(rewrite(honest_pt2(), {"models/model.json": edit_json(change)}))


def copied_folder(path: Path) -> Path:
    """A diffusers folder with configs and without weights."""
    from diffusers_configs import write_configs

    write_configs(path)
    return path


def main(make: Callable[[Path, Path], None]) -> None:
    """`python tests/attacks/<abuse>.py OUT CANARY` crafts the file; give it to `edgegen inspect` to see it refused."""
    make(Path(sys.argv[1]), Path(sys.argv[2]))
