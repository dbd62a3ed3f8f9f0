"""Spaces within single blocks, written down by hand: what lies between the two convolutions of a residual block, and
the inner units of a feed-forward."""

import numpy as np

from edgegen.prune.space import Cut, Space, Spaces


def owners(count, repeats=1):
    return np.tile(np.arange(count, dtype=np.int32), repeats)


def spaces(module):
    """Of an `edgegen.students.networks.unet.UNet` or `TinyDecoder`."""
    state = module.state_dict()
    found = []

    def add(name, kind, count, writes, reads, norms=(), groups=1):
        writes = tuple(Cut(one, 0, owners(count, state[one].shape[0] // count)) for one in writes)
        reads = tuple(Cut(one, 1, owners(count)) for one in reads)
        norms = tuple(Cut(one, 0, owners(count)) for one in norms)
        found.append(Space(name, kind, count, (*writes, *norms, *reads), reads, writes, groups))

    for name, one in module.named_modules():
        kind = type(one).__name__
        if kind == "ResnetBlock":
            writes = [f"{name}.{part}" for part in ("conv1.weight", "conv1.bias")]
            writes += [f"{name}.time_emb_proj.weight", f"{name}.time_emb_proj.bias"]
            norms = [f"{name}.norm2.weight", f"{name}.norm2.bias"]
            count = one.conv1.out_channels
            add(name, "channels", count, writes, [f"{name}.conv2.weight"], norms, one.norm2.num_groups)
        elif kind == "FeedForward":
            writes = [f"{name}.net.0.proj.weight", f"{name}.net.0.proj.bias"]
            add(name, "ffn", one.net[2].in_features, writes, [f"{name}.net.2.weight"])
        elif kind == "Block":
            for index in (0, 2):
                writes = [f"{name}.conv.{index}.weight", f"{name}.conv.{index}.bias"]
                reads = [f"{name}.conv.{index + 2}.weight"]
                add(f"{name}.{index}", "channels", one.conv[index].out_channels, writes, reads)
    return Spaces(tuple(found), sizes={key: tuple(value.shape) for key, value in state.items()})


def magnitudes(component, found):
    """The norm of what writes each unit."""
    state = component.module.state_dict()
    made = {}
    for space in found.spaces:
        sums = np.zeros(space.count)
        for cut in space.writes:
            rows = (
                state[cut.parameter].double().flatten(1).square().sum(1)
                if state[cut.parameter].dim() > 1
                else (state[cut.parameter].double().square())
            )
            np.add.at(sums, cut.owners, rows.numpy())
        made[space.name] = np.sqrt(sums).tolist()
    return made
