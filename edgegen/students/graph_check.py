"""The graph inside a `.pt2`, judged as JSON before torch turns it into objects and source text.

Fail-closed: every string must be known to be harmless by the key it stands under, or the file is refused.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import torch

from edgegen.errors import EdgegenError, UnsafeError
from edgegen.students.archive import DAMAGED_HINT, EXPORT_HINT

NAMESPACES = ("aten", "prims")
HIGHER_ORDER = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
DENIED = frozenset({"aten::from_file", "aten::_print"})
"""Operators that reach outside the graph: one maps a file by name, one writes to the terminal."""

CODE_KEYS = {
    "as_operator": "an operator passed as a value",
    "as_custom_obj": "a pickled object",
    "custom_obj": "a pickled object",
    "class_fqn": "a class of its own",
}
FREE_TEXT = frozenset({"as_string", "as_strings"})
"""Reaches operators as a quoted argument only."""

KEPT_METADATA = ("nn_module_stack", "torch_fn")
NAME = re.compile(r"[A-Za-z_]\w{0,1000}")
DOTTED = re.compile(r"[\w.]{0,1000}")
TARGET = re.compile(r"torch\.ops\.(\w+)\.(\w+)(?:\.(\w+))?")
EXPRESSION = re.compile(r"[\w'(),=. +*/-]{0,1000}")
SYMBOLIC = re.compile(
    r"[su]\d+|[\d.]+|Symbol|Integer|Add|Mul|Pow|Mod|FloorDiv|CleanDiv|Max|Min|positive|integer|True|False"
)
PROVENANCE = re.compile(r"[\w.,;:'\"\[\]@() <>/$-]{0,10000}")
TREE_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict")


def check_graph(document: dict[str, Any], name: str) -> dict[str, Any]:
    """The document without guards, free metadata and stack traces; `name` is the file, for messages.

    Raises UnsafeError for whatever could run or become code, EdgegenError for dynamic shapes and damage.
    """
    if document.get("guards_code"):
        raise UnsafeError(
            f"`{name}` carries Python source in `guards_code`, which torch would execute", hint=EXPORT_HINT
        )
    try:
        module = dict(document["graph_module"])
        if module.get("treespec_namedtuple_fields"):
            raise EdgegenError(f"`{name}` takes or gives named tuples", hint=f"pass plain tensors; {EXPORT_HINT}")
        module["metadata"] = {}
        calls = [dict(entry) for entry in module.pop("module_call_graph")]
        for entry in calls:
            _check_call(entry, name)
        module["graph"] = _walk(module["graph"], "graph", name)
        module["signature"] = _walk(module["signature"], "signature", name)
        module["module_call_graph"] = calls
        return {
            "graph_module": module,
            "opset_version": {"aten": int(document["opset_version"]["aten"])},
            "range_constraints": {},
            "schema_version": {key: int(document["schema_version"][key]) for key in ("major", "minor")},
            "verifiers": [v for v in document.get("verifiers", []) if v in ("TRAINING", "ATEN", "")],
            "torch_version": "",
            "guards_code": [],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EdgegenError(f"the graph of `{name}` is damaged: {error!r}", hint=DAMAGED_HINT) from error
    except RecursionError as error:
        raise EdgegenError(f"the graph of `{name}` is nested too deeply", hint=EXPORT_HINT) from error


def _walk(value: Any, key: str, name: str) -> Any:
    """A copy of `value` with node metadata reduced; raises on the first string that is not harmless where it stands."""
    if isinstance(value, dict):
        if "expr_str" in value:
            _check_expression(value["expr_str"], name)
            raise EdgegenError(
                f"`{name}` has dynamic shapes, and edgegen compiles static ones",
                hint=f"without `dynamic_shapes`: {EXPORT_HINT}",
            )
        made = {}
        for inner, part in value.items():
            if inner in CODE_KEYS:
                raise UnsafeError(f"`{name}` holds {CODE_KEYS[inner]} (`{inner}`)", hint=EXPORT_HINT)
            _require(DOTTED, inner, key, name)
            made[inner] = _metadata(part, name) if inner == "metadata" else _walk(part, inner, name)
        return made
    if isinstance(value, list):
        return [_walk(part, key, name) for part in value]
    if isinstance(value, str):
        if key == "target":
            _check_target(value, name)
        elif key in ("name", "as_name"):
            # Becomes an identifier in generated source; operators name no argument as the empty string.
            if value:
                _require(NAME, value, key, name)
        elif key == "type":
            if value != "cpu":
                raise EdgegenError(
                    f"`{name}` was exported on device {value[:20]!r}", hint=f"move the module to the CPU; {EXPORT_HINT}"
                )
        elif key not in FREE_TEXT:
            _require(DOTTED, value, key, name)
    return value


def _require(pattern: re.Pattern[str], value: str, key: str, name: str) -> None:
    if not pattern.fullmatch(value):
        raise UnsafeError(
            f"`{name}` has {value[:80]!r} where `{key}` must be a plain name: it would become source text",
            hint=EXPORT_HINT,
        )


def _check_expression(text: str, name: str) -> None:
    """Dynamic shapes are refused either way; one that is not plain arithmetic is called what it is."""
    words = re.findall(r"[\w.]+", text)
    if not EXPRESSION.fullmatch(text) or not all(SYMBOLIC.fullmatch(word) for word in words):
        raise UnsafeError(
            f"`{name}` has {text[:80]!r} for a size (`expr_str`), which torch would evaluate as Python",
            hint=EXPORT_HINT,
        )


@functools.cache
def _operators() -> frozenset[str]:
    """Operators that torch's dispatcher knows: TorchScript's own, such as `aten::save`, are not among them."""
    return frozenset(torch._C._dispatch_get_all_op_names())


def _check_target(target: str, name: str) -> None:
    if target == "_operator.getitem":
        return
    match = TARGET.fullmatch(target)
    namespace, operator, overload = match.groups() if match else ("", "", None)
    if namespace == "higher_order" and operator in HIGHER_ORDER and overload is None:
        return
    qualified = f"{namespace}::{operator}"
    full = qualified if overload == "default" else f"{qualified}.{overload}"
    if namespace not in NAMESPACES or overload is None or qualified in DENIED or full not in _operators():
        raise UnsafeError(
            f"`{name}` calls `{target[:120]}`; only operators of {' and '.join(NAMESPACES)} are opened",
            hint=f"replace the custom operator by torch's own; {EXPORT_HINT}",
        )


def _metadata(value: dict[str, Any], name: str) -> dict[str, str]:
    kept = {}
    for key in KEPT_METADATA:
        text = value.get(key, "")
        if isinstance(text, str) and text and PROVENANCE.fullmatch(text):
            kept[key] = text
    return kept


def _check_call(entry: dict[str, Any], name: str) -> None:
    """Trees may hold tuples, lists and dicts with plain keys: other types make torch import the module they name."""
    _require(re.compile(r"[\w.@]{0,1000}"), entry["fqn"], "fqn", name)
    signature = entry.get("signature")
    if signature is None:
        return
    _walk({key: signature[key] for key in ("inputs", "outputs")}, "signature", name)
    for argument in signature.get("forward_arg_names") or []:
        _require(NAME, argument, "forward_arg_names", name)
    for key in ("in_spec", "out_spec"):
        protocol, tree = json.loads(signature[key])
        if protocol != 1:
            raise EdgegenError(f"`{key}` of `{name}` has an unknown version", hint=EXPORT_HINT)
        _check_tree(tree, key, name)


def _check_tree(tree: dict[str, Any], key: str, name: str) -> None:
    if tree["type"] not in TREE_TYPES:
        raise UnsafeError(
            f"`{key}` of `{name}` names the type `{str(tree['type'])[:80]}`, which torch would import", hint=EXPORT_HINT
        )
    context = tree["context"]
    decoded = json.loads(context) if isinstance(context, str) else context
    if decoded is not None and not (isinstance(decoded, list) and all(isinstance(k, str) for k in decoded)):
        raise UnsafeError(
            f"`{key}` of `{name}` carries {str(context)[:80]!r}, which torch would import", hint=EXPORT_HINT
        )
    for argument in decoded or []:
        _require(NAME, argument, key, name)
    for child in tree["children_spec"]:
        _check_tree(child, key, name)
