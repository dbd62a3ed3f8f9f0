"""What the allocator does with memory that was freed: networks allocate and free tens of megabytes for each operation,
and a page that was given back to the system costs a fault, and zeroing, when it comes again."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """From here on this process keeps up to a gigabyte of what it freed. Does nothing where the C library is not
    glibc. For what executes networks: a converter that frees its weights should give them back."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
