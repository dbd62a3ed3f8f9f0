"""A module made smaller by a record of what is cut out of it (`edgegen.students.pruning`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgegen.errors import EdgegenError
from edgegen.students.networks.separable_conv import SeparableConv, separable, separated
from edgegen.students.pruning import PRUNE_HINT, Pruning, Way, count, ranges


class Passed(nn.Module):
    """Stands where a module was removed: gives the first of what it is called with, or zeros like it."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way = way

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = next(iter((*args, *kwargs.values())))
        value = first if self.way == "identity" else torch.zeros_like(first)
        # What diffusers' transformers are asked for: the first of a tuple.
        return (value,) if kwargs.get("return_dict") is False else value

    def extra_repr(self) -> str:
        return self.way


NORMS: dict[type[nn.Module], str] = {
    nn.LayerNorm: "normalized_shape",
    nn.RMSNorm: "normalized_shape",
    nn.GroupNorm: "num_channels",
}
"""Norm -> the attribute that has its size. A norm without weights is cut by this name."""


def reduce(module: nn.Module, pruning: Pruning, *, weights: bool) -> nn.Module:
    """`module` itself, made smaller: parameters cut, sizes that modules remember set to what is left of them.

    `weights`: the values that stay are those of `module`; without, parameters are uninitialised, for a state dict that
    follows. Buffers that no state dict has always keep their values. EdgegenError for a record that does not fit:
    unknown names, positions out of range, groups of a convolution cut in two, a norm whose groups cannot be equal.
    """
    _remove(module, pruning.removed)
    _separate(module, pruning.separated, weights)
    tensors = _tensors(module)
    widths = {id(one): _head_width(one) for one in module.modules()}
    done: dict[tuple[int, int], int] = {}
    """Tensor and dimension -> the list that it was cut by: a tied one is cut once, however many names it has."""
    for name, dims in pruning.cuts.items():
        places = tensors.get(name)
        if places is None:
            if not _resize(module, name, dims, pruning):
                raise EdgegenError(f"pruning cuts `{name}`, which the network does not have", PRUNE_HINT)
            continue
        tensor = places[0].get()
        for dim, index in dims.items():
            _check(name, tensor, dim, pruning.kept[index])
            if done.setdefault((id(tensor), dim), index) != index:
                raise EdgegenError(
                    f"pruning cuts `{name}`, which is tied to another parameter, in two ways", PRUNE_HINT
                )
    shared: dict[int, list[_Place]] = {}
    cut: dict[int, dict[int, str]] = {}
    for name, places in tensors.items():
        tensor = places[0].get()
        shared.setdefault(id(tensor), places)
        if name in pruning.cuts:
            cut.setdefault(id(tensor), {}).update({d: pruning.kept[i] for d, i in pruning.cuts[name].items()})
    for key, dims_ in cut.items():
        _cut(shared[key], dims_, weights)
    for one in module.modules():
        _settle(one)
    for one in module.modules():
        _settle_above(one, widths[id(one)])
    return module


@dataclass(frozen=True)
class _Place:
    """Where a module holds a tensor; a tied one has several."""

    path: str
    holder: nn.Module
    attribute: str
    parameter: bool

    def get(self) -> Tensor:
        held = self.holder._parameters if self.parameter else self.holder._buffers
        value = held[self.attribute]
        assert value is not None
        return value

    @property
    def saved(self) -> bool:
        return self.parameter or self.attribute not in self.holder._non_persistent_buffers_set


def _tensors(module: nn.Module) -> dict[str, list[_Place]]:
    """Name -> every place that holds that very tensor."""
    by_identity: dict[int, list[_Place]] = {}
    names: dict[str, int] = {}
    for path, holder in module.named_modules(remove_duplicate=False):
        for parameter, held in ((True, holder._parameters), (False, holder._buffers)):
            for attribute, tensor in held.items():
                if tensor is not None:
                    names[f"{path}.{attribute}" if path else attribute] = id(tensor)
                    place = _Place(path, holder, attribute, parameter)
                    known = by_identity.setdefault(id(tensor), [])
                    if not any(one.holder is holder and one.attribute == attribute for one in known):
                        known.append(place)
    return {name: by_identity[key] for name, key in names.items()}


def positions_in(text: str) -> Tensor:
    """int64."""
    # On the CPU even where a network is rehearsed on the meta device: what they are is asked.
    return torch.cat([torch.arange(first, last + 1, device="cpu") for first, last in ranges(text)])


def _check(name: str, tensor: Tensor, dim: int, text: str) -> None:
    if dim >= tensor.ndim:
        raise EdgegenError(f"pruning cuts dimension {dim} of `{name}`, which has {tensor.ndim}", PRUNE_HINT)
    last = max(last for _, last in ranges(text))
    if last >= tensor.shape[dim]:
        raise EdgegenError(f"pruning keeps position {last} of `{name}`, which has {tensor.shape[dim]}", PRUNE_HINT)


def _cut(places: list[_Place], dims: Mapping[int, str], weights: bool) -> None:
    old = places[0].get()
    for place in places:
        _regroup(place, old, dims)
    if weights or not places[0].saved:
        new = old.detach()
        for dim, text in dims.items():
            new = new.index_select(dim, positions_in(text).to(new.device))
        new = new.contiguous()
    else:
        shape = [count(dims[dim]) if dim in dims else size for dim, size in enumerate(old.shape)]
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
    parameter = nn.Parameter(new, requires_grad=old.requires_grad) if places[0].parameter else None
    for place in places:
        if parameter is None:
            place.holder._buffers[place.attribute] = new
        else:
            place.holder._parameters[place.attribute] = parameter


def _regroup(place: _Place, old: Tensor, dims: Mapping[int, str]) -> None:
    """Groups of convolutions and norms follow from the positions themselves, so they are set before these are gone."""
    holder = place.holder
    if place.attribute != "weight" or 0 not in dims:
        if isinstance(holder, nn.modules.conv._ConvNd) and holder.groups > 1 and 1 in dims:
            raise EdgegenError(f"pruning cuts within the groups of `{place.path}`", PRUNE_HINT)
        return
    if isinstance(holder, nn.modules.conv._ConvNd) and holder.groups > 1:
        if 1 in dims:
            raise EdgegenError(f"pruning cuts within the groups of `{place.path}`", PRUNE_HINT)
        size = old.shape[0] // holder.groups
        left = torch.unique(positions_in(dims[0]) // size)
        if len(left) * size != count(dims[0]):
            raise EdgegenError(f"pruning cuts a group of the grouped convolution `{place.path}` in two", PRUNE_HINT)
        holder.groups = len(left)
    elif isinstance(holder, nn.GroupNorm):
        holder.num_groups = norm_groups(positions_in(dims[0]), old.shape[0], holder.num_groups)


def norm_groups(positions: Tensor, channels: int, groups: int) -> int:
    """How many groups a group norm has for the channels that are left: those of its `groups` in which any is, where
    equally many are left in each, so that each is normed with those that it was normed with. Otherwise (across a
    concatenation) the largest number up to `groups` that divides the channels."""
    counts = torch.bincount(positions // (channels // groups), minlength=groups)
    left = counts[counts > 0]
    if bool((left == left[0]).all()):
        return len(left)
    return next(number for number in range(groups, 0, -1) if len(positions) % number == 0)


def _resize(module: nn.Module, name: str, dims: Mapping[int, int], pruning: Pruning) -> bool:
    """Set the size of a norm without weights; False where `name` is none."""
    path, _, attribute = name.rpartition(".")
    try:
        norm = module.get_submodule(path)
    except AttributeError:
        return False
    known = next((size for kind, size in NORMS.items() if isinstance(norm, kind)), None)
    if known != attribute or getattr(norm, "weight", None) is not None or list(dims) != [0]:
        return False
    positions = pruning.kept[dims[0]]
    if isinstance(norm, nn.GroupNorm):
        _check(name, torch.empty(norm.num_channels, device="meta"), 0, positions)
        norm.num_groups = norm_groups(positions_in(positions), norm.num_channels, norm.num_groups)
        norm.num_channels = count(positions)
        return True
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    if len(norm.normalized_shape) != 1:
        return False
    _check(name, torch.empty(norm.normalized_shape, device="meta"), 0, positions)
    norm.normalized_shape = (count(positions),)
    return True


HEADS = (("heads", "to_q"), ("num_heads", "q_proj"), ("num_heads", "to_q"))
"""Attribute that counts heads, and the projection whose outputs are theirs."""


def _head_width(module: nn.Module) -> tuple[str, str, int] | None:
    for attribute, projection in HEADS:
        count, linear = getattr(module, attribute, None), getattr(module, projection, None)
        if isinstance(count, int) and isinstance(linear, nn.Linear) and count and linear.out_features % count == 0:
            return attribute, projection, linear.out_features // count
    return None


def _settle(module: nn.Module) -> None:
    """Sizes that a module remembers, from the tensors that it holds now."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        here, there = weight.shape[0], weight.shape[1] * module.groups
        module.in_channels, module.out_channels = (here, there) if module.transposed else (there, here)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]


def _settle_above(module: nn.Module, heads: tuple[str, str, int] | None) -> None:
    """What a module remembers of its children, which know their own sizes by now."""
    if heads is not None:
        attribute, projection, width = heads
        outputs = getattr(module, projection).out_features
        if outputs % width:
            raise EdgegenError(f"pruning leaves part of a head: {outputs} outputs, heads of {width}", PRUNE_HINT)
        setattr(module, attribute, outputs // width)
    # What diffusers' resamplers hold their input against.
    channels, conv = getattr(module, "channels", None), getattr(module, "conv", None)
    if isinstance(channels, int) and isinstance(conv, nn.Conv2d | SeparableConv):
        module.channels = conv.in_channels  # type: ignore[assignment]


def _remove(module: nn.Module, removed: Mapping[str, Way]) -> None:
    for path, way in removed.items():
        if any(path.startswith(f"{other}.") for other in removed):
            raise EdgegenError(f"pruning removes module `{path}` within another that it removes", PRUNE_HINT)
        parent, name = _parent(module, path, "removes")
        parent._modules[name] = Passed(way)


def _separate(module: nn.Module, ranks: Mapping[str, int], weights: bool) -> None:
    for path, rank in ranks.items():
        parent, name = _parent(module, path, "separates")
        conv = parent._modules[name]
        assert conv is not None
        why = separable(conv)
        if why is not None or not isinstance(conv, nn.Conv2d):
            raise EdgegenError(f"pruning separates `{path}`, and {why}", PRUNE_HINT)
        parent._modules[name] = separated(conv, rank, weights=weights)


def _parent(module: nn.Module, path: str, does: str) -> tuple[nn.Module, str]:
    """What holds the module at `path`, and by which name."""
    above, _, name = path.rpartition(".")
    try:
        if not name:
            raise AttributeError(path)
        module.get_submodule(path)
        return module.get_submodule(above), name
    except AttributeError as error:
        raise EdgegenError(f"pruning {does} module `{path}`, which the network does not have", PRUNE_HINT) from error
