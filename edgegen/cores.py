"""How much of the processor is this process's."""

from __future__ import annotations

import os


def cores() -> int:
    """Cores that this process may use; a runtime makes no more threads than that."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
