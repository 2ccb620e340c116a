"""Access to a network's blocks and to the sizes in its config, to read and to reduce them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.blocks import Block
from lit_llm.compression.calibration import answer
from lit_llm.compression.compression import Batch, records_of, replay
from lit_llm.modes import evaluating

NOT_OF_BLOCKS = ("architectures", "eos_token_id", "image_size", "patch_size")
"""Lists in a config that have no entry per block, even if their length matches."""


def list_of_blocks(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name of a network's only list of blocks, and the list.

    Raises:
        ValueError: When it has none, or several.
    """
    lists = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(block, Block) for block in module)
    }
    if len(lists) != 1:
        raise ValueError(
            f"network must have one list of blocks, but a {type(network).__name__} has {len(lists)} "
            f"({', '.join(lists) or 'none'})"
        )
    return next(iter(lists.items()))


def linear_of(block: nn.Module, name: str) -> nn.Linear | None:
    """A linear layer of a block, by its dotted name; `None` if there is none."""
    for part in name.split("."):
        block = getattr(block, part, None)
    return block if isinstance(block, nn.Linear) else None


def owners(network: nn.Module) -> list[Any]:
    """The network and the configs that hold its sizes."""
    configs = [getattr(network, "config", None), getattr(getattr(network, "model", None), "config", None)]
    return [network, *(config.get_text_config() for config in configs if config is not None)]


def size_of(network: nn.Module, names: tuple[str, ...]) -> int | None:
    """A size of the network, under the first of the names that it or its config has; `None` if there is none."""
    found = (getattr(owner, name, None) for owner in owners(network) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def set_size(network: nn.Module, names: tuple[str, ...], size: int) -> None:
    """Sets a size under each of the names that the network or its config has."""
    for owner in owners(network):
        for name in names:
            if isinstance(vars(owner).get(name), int):
                setattr(owner, name, size)


def keep_listed(network: nn.Module, stay: list[int], num: int) -> None:
    """Keeps the entries of the blocks `stay` in each list of the config that has an entry for each of `num` blocks."""
    for owner in owners(network)[1:]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, list) and len(value) == num and name not in NOT_OF_BLOCKS:
                setattr(owner, name, [value[index] for index in stay])


@torch.no_grad()
def keep_units(layer: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keeps only the given outputs or inputs of a layer."""
    weight, bias = layer.weight, layer.bias
    if rows is not None:
        weight, layer.out_features = weight[rows], len(rows)
        if bias is not None:
            layer.bias = nn.Parameter(bias[rows].clone(), bias.requires_grad)
    if columns is not None:
        weight, layer.in_features = weight[:, columns], len(columns)
    layer.weight = nn.Parameter(weight.clone(), layer.weight.requires_grad)


@torch.no_grad()
def require_described(network: nn.Module, batches: Sequence[Batch] = ()) -> None:
    """Requires that the network's config still describes it, so that its model directory can be read.

    With batches, a network built from the config with the same weights must also give the same output on the first
    batch, up to 1 % of its largest absolute value.
    """
    with torch.device("meta"):
        again = replay(type(network).from_hf_config(network.to_hf_config()), records_of(network))
    shapes, expected = ({n: tuple(p.shape) for n, p in made.named_parameters()} for made in (network, again))
    if shapes != expected:
        name = min(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"network must still be one that its config can describe, but of a {type(network).__name__} {name} is "
            f"{shapes.get(name, 'absent')} where that says {expected.get(name, 'absent')}"
        )
    if not batches:
        return
    again.load_state_dict(network.state_dict(), assign=True)
    for name, buffer in network.named_buffers():  # including non-persistent ones
        place, _, own = name.rpartition(".")
        setattr(again.get_submodule(place), own, buffer)
    with evaluating(network), evaluating(again):
        said, expected = (answer(made, batches[0]).float() for made in (network, again))
    apart, most = float((said - expected).abs().max()), float(said.abs().max())
    if apart > 0.01 * most:
        raise ValueError(
            f"network must still be one that its config can describe, but a {type(network).__name__} made from that "
            f"answers otherwise by {apart:.2g} of {most:.2g}"
        )
