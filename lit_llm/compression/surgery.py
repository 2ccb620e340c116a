"""The blocks of a network and the sizes that it says of itself, to be read and cut."""

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
"""Lists of a config that say nothing of each block, however long they are."""


def list_of_blocks(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one list of blocks that a network has, and its name.

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
    """A linear layer of a block, by its dotted name; `None` where there is none."""
    for part in name.split("."):
        block = getattr(block, part, None)
    return block if isinstance(block, nn.Linear) else None


def owners(network: nn.Module) -> list[Any]:
    """The network and the configs that say how large it is."""
    configs = [getattr(network, "config", None), getattr(getattr(network, "model", None), "config", None)]
    return [network, *(config.get_text_config() for config in configs if config is not None)]


def size_of(network: nn.Module, names: tuple[str, ...]) -> int | None:
    """What a network calls one of its sizes, by the first of some names that it has."""
    found = (getattr(owner, name, None) for owner in owners(network) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def set_size(network: nn.Module, names: tuple[str, ...], size: int) -> None:
    """Sets a size wherever a network, or its config, says it."""
    for owner in owners(network):
        for name in names:
            if isinstance(vars(owner).get(name), int):
                setattr(owner, name, size)


def keep_listed(network: nn.Module, stay: list[int], num: int) -> None:
    """Keeps the entries of some of `num` blocks in each list of its config that has one for each."""
    for owner in owners(network)[1:]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, list) and len(value) == num and name not in NOT_OF_BLOCKS:
                setattr(owner, name, [value[index] for index in stay])


@torch.no_grad()
def keep_units(layer: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keeps some outputs, or inputs, of a layer."""
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
    """Sees that the network is what its config now describes: else no directory of it could be read.

    Where there are batches, that one with the same weights has to answer the first of them alike too.
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
    for name, buffer in network.named_buffers():  # those too that are in no checkpoint
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
