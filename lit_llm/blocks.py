"""The unit of a network that is repeated, and how deep in a network a parameter is."""

from abc import ABC

from torch import nn


class Block(nn.Module, ABC):
    """Marks one repeated layer of a network.

    It is the unit for sharding, activation checkpointing, freezing and distillation taps, so those work on every
    architecture without knowing any: they look for instances of this class. A library's layer becomes one by
    `Block.register`.
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
    """How deep in a network each of its parameters is, from the input up, and how deep its head.

    0 is what comes before the first block (embeddings), 1 to `n` are the blocks, the last of them with what comes
    between it and the head (a norm), and `n + 1` is the head: all that is not `network.backbone` where there is such,
    with the backbone's pooler, which is as good as new after pre-training without it; else the last layer with
    parameters. An embedding that is the head's matrix too is at 0. The order is that in which layers were made, but
    embeddings outside the blocks, such as relative positions, are at 0 with their norms, since all blocks read them,
    and what is outside the backbone is at the top, wherever they were made. Without any blocks what is below the head
    is at 0, and the head at 1.

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
    for p in network.parameters():  # a tied matrix comes once, where it is first
        here = max(here, within.get(p, 0))
        is_head = p in head and (backbone is not None or here or not blocks)
        found[p] = within.get(p, top if is_head else 0 if p in embeddings else here)
    return found, top


def _of_embeddings(network: nn.Module) -> set[nn.Parameter]:
    """Embeddings and, where they were made behind blocks, what was made behind them in the same module: their norm."""
    found: set[nn.Parameter] = set()
    for parent in network.modules():
        after_blocks = behind = False
        for name, child in parent.named_children():
            is_one = isinstance(child, nn.Embedding)
            behind = behind or (is_one and after_blocks)
            after_blocks = after_blocks or any(isinstance(module, Block) for module in child.modules())
            if is_one or behind or "norm_emb" in name:  # as BART's kin call the norm of theirs
                found.update(child.parameters())
    return found
