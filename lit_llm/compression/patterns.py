"""Selection of the layers that a method acts on."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from lit_llm.blocks import Block
from lit_llm.compression.integers import Quantized

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers whose weight is a matrix: outputs by inputs (by kernel positions)."""


def chosen_layers(
    network: nn.Module, patterns: list[str] | None = None, kinds: tuple[type[nn.Module], ...] = MATRICES
) -> dict[str, nn.Module]:
    """The layers of some classes whose names match a pattern, by name and in the network's order.

    Args:
        network: Any network.
        patterns: Shell patterns on whole names; `*` also matches dots: `*.mlp.*`, `layers.0.self_attn.q_proj`. `None`
            is all layers inside blocks, without embeddings and head, or, in a network without blocks, all but the
            last layer (its head).
        kinds: Classes of layers.

    Raises:
        ValueError: When a pattern matches no layer, or there are none, or they are already quantised.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> list(chosen_layers(network)), list(chosen_layers(network, ["[02]"]))
        (['0'], ['0', '2'])
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, kinds)}
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in layers):
            if not layers:
                _refuse_quantized(network)
            known = ", ".join(list(layers)[:4]) or "none"
            raise ValueError(f"layers must be patterns that match a layer ({known}, …), but {pattern!r} matches none")
    if patterns is not None:
        return {name: m for name, m in layers.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    if blocks:
        inside = {layer for block in blocks for layer in block.modules()}
        chosen = {name: layer for name, layer in layers.items() if layer in inside}
    else:
        chosen = dict(list(layers.items())[:-1])
    if not chosen:
        _refuse_quantized(network)
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"network must have layers to compress ({wanted}), but is a {type(network).__name__}")
    return chosen


def _refuse_quantized(network: nn.Module) -> None:
    if any(isinstance(module, Quantized) for module in network.modules()):
        raise ValueError(
            f"network must have layers of real weights to compress, but those of a {type(network).__name__} are "
            f"quantised already; start from the model before that, and quantise last"
        )
