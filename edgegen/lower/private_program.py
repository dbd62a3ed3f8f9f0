"""A copy of an exported program for converters that rewrite the graph they are given."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def private_program(program: ExportedProgram) -> ExportedProgram:
    """`program` with a graph of its own; weights are shared.

    Its nodes have no provenance (`from_node`) yet, so that what is made of them can be traced to exactly these nodes.
    """
    from torch.fx import GraphModule

    module = program.graph_module
    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        node.meta.pop("from_node", None)
    owned = GraphModule(module, graph)
    owned.meta.update(module.meta)
    return program._update(owned, copy.deepcopy(program.graph_signature))
