"""JSON Schema of the three kinds of target file (`targets/schema.json`), emitted from the models that read them."""

from __future__ import annotations

import json

from pydantic import TypeAdapter

from edgegen.targets.model import Chipset, Delegate, Device


def schema() -> dict[str, object]:
    """Draft 2020-12; a file is one of Device, Chipset and Delegate, which share no required set of keys."""
    made = TypeAdapter(Device | Chipset | Delegate).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edgegen target file: a device, a chipset or a delegate",
        **made,
    }


def schema_text() -> str:
    """`schema()` as the file has it."""
    return json.dumps(schema(), indent=2) + "\n"
