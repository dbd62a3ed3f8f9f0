"""Targets: what a device runs, and at which precision. TOML data, one file a device, chipset or delegate."""

from edgegen.targets.model import Target
from edgegen.targets.read import list_targets, load_target

__all__ = ["Target", "list_targets", "load_target"]
