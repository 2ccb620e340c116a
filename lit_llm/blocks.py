"""Blocks, the repeated layers of a network, and the depth of each parameter."""

from abc import ABC

from torch import nn


class Block(nn.Module, ABC):
    """Marks one repeated layer of a network.

    It is the unit of sharding, activation checkpointing, freezing and distillation, which look for instances of this
    class and so work on every architecture. A library's layer becomes a block by `Block.register`.
    """


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The outermost blocks of a network, in its order."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, Block) and module not in inside:
            found.append(module)
            inside |= set(module.modules())
    return found


def depths(network: nn.Module) -> tuple[dict[nn.Parameter, int], int]:
    """The depth of each parameter of a network, counted from the input, and the depth of its head.

    0 is everything before the first block (embeddings), 1 to `n` are the blocks, and `n + 1` is the head. What lies
    between the last block and the head (a norm) is at `n`. If there is a `network.backbone`, the head is everything
    outside it and also the backbone's pooler, which is new if pre-training did without it; else the head is the last
    layer with parameters. An embedding tied to the head is at 0. Otherwise depths follow the order in which layers were
    created, but embeddings outside the blocks, such as relative positions, are at 0 with their norms, since all blocks
    read them. Without blocks, everything below the head is at 0, and the head at 1.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
        >>> found, top = depths(network)
        >>> [found[p] for p in network.parameters()], top
        ([0, 0, 1], 1)
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    within = {p: index for index, block in enumerate(blocks, 1) for p in block.parameters()}
    backbone = getattr(network, "backbone", None)
    pooler = getattr(backbone, "pooler", None)
    pooler = set(pooler.parameters() if pooler is not None else ())
    if backbone is not None:
        below = set(backbone.parameters()) - pooler
        head = {p for p in network.parameters() if p not in below}
    else:
        head = set([m for m in network.modules() if any(True for _ in m.parameters(recurse=False))][-1].parameters())
    found: dict[nn.Parameter, int] = {}
    embeddings, here, top = _of_embeddings(network), 0, len(blocks) + 1
    for p in network.parameters():  # yields a tied matrix once, at its first place
        here = max(here, within.get(p, 0))
        is_head = p in head and (backbone is not None or here or not blocks)
        found[p] = within.get(p, top if is_head else 0 if p in embeddings else here)
    return found, top


def _of_embeddings(network: nn.Module) -> set[nn.Parameter]:
    """Embeddings and, if created after blocks, the layers created after them in the same module: their norm."""
    found: set[nn.Parameter] = set()
    for parent in network.modules():
        after_blocks = behind = False
        for name, child in parent.named_children():
            is_one = isinstance(child, nn.Embedding)
            behind = behind or (is_one and after_blocks)
            after_blocks = after_blocks or any(isinstance(module, Block) for module in child.modules())
            if is_one or behind or "norm_emb" in name:  # their norm in models like BART
                found.update(child.parameters())
    return found
