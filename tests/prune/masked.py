"""The network that a pruned one must equal: as large as before, what is cut read as zero, norms over what is left.

It is the captured graph, interpreted. Where a norm or a mean goes over channels of which some are cut, they are taken
out before it and put back (as zeros) behind it; weights by which products read units that are cut are zero.
"""

import numpy as np
import torch
from torch.fx import Interpreter

from edgegen.graph.count import op_name
from edgegen.graph.edit import weights
from edgegen.prune.axes import vector
from edgegen.prune.find import Found
from edgegen.prune.labels import STAYS
from edgegen.prune.levels import keep
from edgegen.students.reduce import norm_groups


def chosen(spaces, share, seed=0):
    """Units of every space that stay: about `share` of it, any of them."""
    random = np.random.default_rng(seed)
    found = {}
    for space in spaces.spaces:
        count = min(space.counts, key=lambda one: (abs(one - share * space.count), one))
        found[space.name] = keep(space, random.random(space.count), count)
    return found


class Masked(Interpreter):
    def __init__(self, program, found: Found, selection):
        super().__init__(program.graph_module)
        self.program, self.found = program, found
        self.stays = np.ones(int(found.units.max()) + 1, dtype=bool)
        for unit, (name, index) in found.places.items():
            if name in selection and index not in set(selection[name]):
                self.stays[unit] = False
        self.held = {name: value.detach().clone() for name, value in weights(program).items()}
        names = {spec.target: spec.arg.name for spec in program.graph_signature.input_specs if spec.target is not None}
        for space in found.spaces.spaces:
            gone = sorted(set(range(space.count)) - set(selection.get(space.name, range(space.count))))
            for cut in space.reads:
                positions = torch.from_numpy(np.flatnonzero(np.isin(cut.owners, gone)))
                self.held[names[cut.parameter]].index_fill_(cut.dim, positions, 0.0)

    def __call__(self, *inputs):
        given = iter(inputs)
        args = [
            self.held[node.name] if node.name in self.held else next(given)
            for node in self.program.graph.nodes
            if node.op == "placeholder"
        ]
        return self.run(*args, enable_io_processing=False)

    def left(self, node, dim):
        """Positions of `dim` that are left, None for all."""
        labels = self.found.axes.of.get(node)
        nodes = vector(self.found.axes.ledger.settle(labels), dim)
        if bool((nodes == STAYS).all()):
            return None
        stays = np.where(nodes.numpy() == STAYS, True, self.stays[self.found.units[nodes.numpy()]])
        return torch.from_numpy(np.flatnonzero(stays))

    def run_node(self, node):
        name = op_name(node).removeprefix("aten.") if node.op == "call_function" else ""
        rule = getattr(self, f"_{name}", None)
        if rule is None:
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return rule(node, *args, **kwargs)

    def _group_norm(self, node, x, groups, weight=None, bias=None, eps=1e-5, *_):
        left = self.left(node.args[0], 1)
        if left is None:
            return torch.nn.functional.group_norm(x, groups, weight, bias, eps)
        weight, bias = (None if one is None else one[left] for one in (weight, bias))
        number = norm_groups(left, x.shape[1], groups)
        return self._back(x, 1, left, torch.nn.functional.group_norm(x[:, left], number, weight, bias, eps))

    def _layer_norm(self, node, x, shape, weight=None, bias=None, eps=1e-5, *_):
        left = self.left(node.args[0], -1)
        if left is None:
            return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
        weight, bias = (None if one is None else one[left] for one in (weight, bias))
        return self._back(x, -1, left, torch.nn.functional.layer_norm(x[..., left], (len(left),), weight, bias, eps))

    def _rms_norm(self, node, x, shape, weight=None, eps=None):
        left = self.left(node.args[0], -1)
        if left is None:
            return torch.nn.functional.rms_norm(x, shape, weight, eps)
        weight = None if weight is None else weight[left]
        return self._back(x, -1, left, torch.nn.functional.rms_norm(x[..., left], (len(left),), weight, eps))

    def _mean(self, node, x, dims=None, keepdim=False, **_):
        for dim in dims or range(x.ndim):
            left = self.left(node.args[0], dim)
            if left is not None:
                x = x.index_select(dim, left)
        return x.mean(dims, keepdim)

    @staticmethod
    def _back(x, dim, left, value):
        return torch.zeros_like(x).index_copy(dim, left, value)
