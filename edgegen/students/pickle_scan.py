"""A pickle's imports, read from its opcodes without executing one of them.

torch's `weights_only` unpickler is the lock on the door; this is the doorman, who can also say who was there.
"""

from __future__ import annotations

import pickletools

from edgegen.errors import EdgegenError, UnsafeError

PLAIN_GLOBALS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(
            f"torch.{dtype}Storage"
            for dtype in ("Float", "Half", "BFloat16", "Double", "Int", "Long", "Short", "Char", "Byte", "Bool")
        ),
        "torch.storage.UntypedStorage",
    }
)
"""What a dict of plain tensors needs, and nothing else."""


def foreign_globals(data: bytes, *, cut: bool = False) -> list[str]:
    """Dotted names that the pickle would import and that plain tensors do not need, in order.

    With `cut` the data may end early and what was found so far is given. Otherwise ValueError when it is malformed.
    An import whose name is computed while unpickling is given as `<computed>`.
    """
    found: list[str] = []
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST"):
                name = str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                name = ".".join(strings[-2:]) if len(strings) >= 2 else "<computed>"
            elif opcode.name.startswith("EXT"):
                name = "<computed>"
            else:
                if isinstance(argument, str):
                    strings.append(argument)
                continue
            if name not in PLAIN_GLOBALS and name not in found:
                found.append(name)
    except Exception as error:  # pickletools raises whatever its readers meet in damaged data
        if not cut:
            raise ValueError(f"malformed pickle: {error}") from error
    return found


def require_plain(data: bytes, name: str, hint: str) -> None:
    """UnsafeError when the pickle names anything but plain tensors and containers, EdgegenError when it is
    malformed.
    """
    try:
        names = foreign_globals(data)
    except ValueError as error:
        raise EdgegenError(f"`{name}` is damaged: {error}", hint="copy or download the file again") from error
    if names:
        what = "a pickled module" if any(_looks_like_module(n) for n in names) else "a pickle"
        raise UnsafeError(f"`{name}` is {what} that names `{names[0]}`: unpickling it would run that code", hint=hint)


def _looks_like_module(name: str) -> bool:
    return name.startswith(("torch.nn.modules.", "__main__.", "diffusers.", "transformers."))
