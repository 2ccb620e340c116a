"""The unit of a network that is repeated."""

from abc import ABC

from torch import nn


class Block(nn.Module, ABC):
    """Marks one repeated layer of a network.

    It is the unit for sharding, activation checkpointing, freezing and distillation taps, so those work on every
    architecture without knowing any: they look for instances of this class. A library's layer becomes one by
    `Block.register`.
    """
