"""What a path holds, told by its content. Names and suffixes are never believed."""

from __future__ import annotations

import struct
from enum import Enum
from pathlib import Path

from edgegen.errors import EdgegenError, UnsafeError
from edgegen.students.archive import EXPORT_HINT, Archive, open_archive
from edgegen.students.pickle_scan import foreign_globals

ACCEPTED = "an edgegen `.pt`, a `.safetensors` with its config, a diffusers folder or a `.pt2`"
PACK_HINT = (
    "in the code that made it, `torch.save(module.state_dict(), 'weights.pt')`, then "
    "`edgegen student pack weights.pt --config student.json`"
)
MAX_SAFETENSORS_HEADER = 100 << 20

FOREIGN = {
    b"\x89HDF": "an HDF5 file (Keras)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x93NUM": "a NumPy array",
    b"ET12": "an ExecuTorch program",
}


class Kind(Enum):
    """The forms in which a student is accepted."""

    TORCH_ZIP = "torch zip"
    SAFETENSORS = "safetensors"
    DIFFUSERS = "diffusers folder"
    EXPORTED_PROGRAM = "exported program"


def sniff(path: Path) -> tuple[Kind, Archive | None]:
    """The kind of `path` and, for a zip, its checked directory.

    Raises UnsafeError for what could run code when opened (pickles, TorchScript), EdgegenError for what is not a
    student.
    """
    try:
        if path.is_dir():
            return _sniff_folder(path), None
        if not path.exists():
            raise EdgegenError(f"`{path}` does not exist", hint="check the path with `ls`")
        if not path.is_file():
            raise EdgegenError(f"`{path}` is neither a file nor a folder", hint=f"give {ACCEPTED}")
        with path.open("rb") as stream:
            head = stream.read(512)
        size = path.stat().st_size
    except OSError as error:
        raise EdgegenError(
            f"`{path}` cannot be read: {error.strerror}", hint=f"check its permissions with `ls -l {path}`"
        ) from error
    if not head:
        raise EdgegenError(f"`{path}` is empty", hint=f"give {ACCEPTED}")
    if head[:2] == b"PK":
        archive = open_archive(path, path.name)
        return _sniff_archive(archive), archive
    if _is_safetensors(head, size):
        return Kind.SAFETENSORS, None
    raise _refusal(path, head, size)


def _sniff_folder(path: Path) -> Kind:
    if (path / "model_index.json").is_file():
        return Kind.DIFFUSERS
    inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pt2"))
    hint = f"give the file itself: `{path / inside[0]}`" if inside else f"give {ACCEPTED}"
    raise EdgegenError(f"folder `{path}` has no `model_index.json`, so it is not a diffusers folder", hint=hint)


def _is_safetensors(head: bytes, size: int) -> bool:
    if len(head) < 10:
        return False
    (header,) = struct.unpack("<Q", head[:8])
    return head[8:9] == b"{" and 2 <= header <= min(size - 8, MAX_SAFETENSORS_HEADER)


def _sniff_archive(archive: Archive) -> Kind:
    names = archive.sizes
    if "archive_format" in names and "archive_version" in names:
        return Kind.EXPORTED_PROGRAM
    if "data.pkl" in names:
        return Kind.TORCH_ZIP
    if any(Path(name).name.startswith("serialized_exported_program") for name in names):
        raise UnsafeError(
            f"`{archive.name}` is a `.pt2` of torch 2.7 or older, which can only be opened by unpickling it",
            hint=f"with a torch of 2.8 or newer, {EXPORT_HINT}",
        )
    raise EdgegenError(f"`{archive.name}` is a zip archive, but not one of torch's", hint=f"give {ACCEPTED}")


def _refusal(path: Path, head: bytes, size: int) -> EdgegenError:
    if head[4:8] == b"TFL3":
        found = "a TFLite model"
    else:
        found = next((name for magic, name in FOREIGN.items() if head.startswith(magic)), "")
    if found:
        return EdgegenError(f"`{path.name}` is {found}, not a student", hint=f"give {ACCEPTED}")
    if head[:1] == b"\x80" and head[1:2] in b"\x00\x01\x02\x03\x04\x05":
        with path.open("rb") as stream:
            names = foreign_globals(stream.read(1 << 20), cut=True)
        named = f" that names `{names[0]}`" if names else ""
        return UnsafeError(
            f"`{path.name}` is a bare pickle{named}: unpickling it would run what it names", hint=PACK_HINT
        )
    if head[257:262] == b"ustar":
        return UnsafeError(f"`{path.name}` is a tar archive, torch's oldest format, which unpickles", hint=PACK_HINT)
    if head.lstrip()[:1] in (b"{", b"["):
        return EdgegenError(f"`{path.name}` is a text file, not weights", hint=f"give {ACCEPTED}")
    if len(head) >= 9 and head[8:9] == b"{":
        return EdgegenError(
            f"`{path.name}` looks like safetensors but its header does not fit its {size} bytes: it is cut off",
            hint="copy or download the file again",
        )
    return EdgegenError(f"`{path.name}` is none of the formats that edgegen reads", hint=f"give {ACCEPTED}")
