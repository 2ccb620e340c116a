"""Heads of classifiers: reordering their classes to those of the data, and the output layer of a regression."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lit_llm.checkpoints import Model
from lit_llm.recipes import built
from lit_llm.wording import listed

NO_NAME = re.compile(r"LABEL_\d+|[+-]?\d+", re.IGNORECASE)
"""Name of a class of which only the number is known."""

RESERVED = re.compile(r"LABEL_\d+", re.IGNORECASE)
"""Name of a spare class, which had no examples; any class may take its place."""


def order_of(wanted: Sequence[str] | None, own: Sequence[str] | None) -> list[int] | None:
    """The order in which a head's classes are the wanted ones, followed by those that are not wanted.

    Classes are matched by name, ignoring case if that is needed; a wanted class that is not found takes a spare one,
    such as `LABEL_2`. If a side has no names or only numbers (`1`, `LABEL_1`), the order is kept. `None` if the head is
    for other classes.

    Args:
        wanted: Names of the data's classes.
        own: Names of the head's classes.

    Example:
        >>> order_of(["bad", "good"], ["GOOD", "BAD", "so-so"])
        [1, 0, 2]
        >>> order_of(["bad", "good"], ["LABEL_0", "LABEL_1"])
        [0, 1]
        >>> order_of(["bad", "good"], ["good", "LABEL_1"])
        [1, 0]
        >>> order_of(["bad", "good"], ["cat", "dog"])
    """
    own = list(own or [])
    if not wanted or not own:
        return list(range(len(own)))
    reserved = [place for place, name in enumerate(own) if RESERVED.fullmatch(name)]
    for form, free in ((str, []), (str.casefold, reserved)):
        places, left = {form(name): place for place, name in enumerate(own)}, iter(free)
        known = {name for name in wanted if form(name) in places}
        found = [places[form(name)] if name in known else next(left, None) for name in wanted]
        if known and None not in found and len(set(found)) == len(found):
            return found + [place for place in range(len(own)) if place not in found]
    if any(all(map(NO_NAME.fullmatch, names)) for names in (wanted, own)):
        return list(range(len(own)))
    return None


def head_of(source: Model, where: str) -> set[str]:
    """The names of the parameters and buffers whose size depends on the number of classes.

    Args:
        source: The model.
        where: Its name in errors.

    Raises:
        ValueError: When the head is compressed.
    """
    options = {name: value for name, value in source.recipe["init_args"].items() if name != "class_names"}
    with torch.device("meta"):
        one, more = (
            built(source.recipe | {"init_args": options}, Path(where), source.recipe["size"] + added).state_dict()
            for added in (0, 1)
        )
    head = {name for name in one if one[name].shape != more[name].shape}
    layers = {name.rpartition(".")[0] for name in head}
    if {name for name in source.network.state_dict() if name.rpartition(".")[0] in layers} != head:
        raise ValueError(
            f"model.weights must have a plain head for classes of other names or in another order, but that of {where} "
            f"({listed(source.network.class_names)}) is compressed"
        )
    return head


def put_in_order(source: Model, order: list[int], where: str) -> None:
    """Reorders a head's classes, in place."""
    if order == list(range(len(order))):
        return
    state = source.network.state_dict()
    for name in head_of(source, where):
        state[name].copy_(state[name][order])
    source.network.class_names = [source.network.class_names[place] for place in order]


def output_layer(network: nn.Module) -> nn.Linear | None:
    """The last linear layer if it has one output, as the head of a regression has."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear and linear[-1].out_features == 1 else None


@torch.no_grad()
def start_at(network: nn.Module, value: float, unit: float = 1.0, is_new: bool = False) -> None:
    """Sets the bias of a new output layer to a value, in place, and multiplies its weights by a unit.

    It is new if `is_new` says so or its bias is 0; else it is trained, and unchanged.

    Example:
        >>> network = nn.Linear(3, 1)
        >>> _ = nn.init.ones_(network.weight), nn.init.zeros_(network.bias)
        >>> start_at(network, 1906.0, unit=32.0)
        >>> network.weight.tolist(), network.bias.tolist()
        ([[32.0, 32.0, 32.0]], [1906.0])
    """
    layer = output_layer(network)
    bias = None if layer is None else layer.bias
    if layer is not None and (is_new or (bias is not None and not bias.any())):
        layer.weight.mul_(unit)
        if bias is not None:
            bias.fill_(value)
