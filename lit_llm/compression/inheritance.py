"""Initialisation of a student from its teacher: some of the blocks, and part of the width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_llm.blocks import blocks_of

FUSED = {"Wqkv": 3, "qkv": 3, "c_attn": 3, "Wi": 2, "gate_up_proj": 2}
"""Matrices that fuse the outputs of several layers: part of their name, and the number of layers."""


JOINED = {"pooled_head.compare": 4, "pooled_head.aggregate": 2}
"""Matrices whose input is a concatenation of vectors: part of their name, and the number of vectors."""


def layer_map(student: nn.Module, teacher: nn.Module, layers: list[int] | None = None) -> list[int]:
    """For each block of a student, the index of the matching block of the teacher.

    Args:
        student: The smaller network.
        teacher: The larger network.
        layers: The indices themselves, from 0; `None` is every k-th block, ending with the last.

    Raises:
        ValueError: When there are no blocks, the student has more, or `layers` does not name one for each.

    Source:
        Jiao et al., 2019, "TinyBERT", arXiv:1909.10351, section 3.1: a uniform mapping `g(m) = k m`.
    """
    few, many = len(blocks_of(student)), len(blocks_of(teacher))
    if not 1 <= few <= many:
        raise ValueError(f"student must have from 1 to as many blocks as its teacher, {many}, but has {few}")
    if layers is None:
        return [(index + 1) * many // few - 1 for index in range(few)]
    if len(layers) != few or not all(0 <= layer < many for layer in layers):
        raise ValueError(
            f"layers must name for each of the student's {few} blocks one of the teacher's, from 0 to {many - 1}, but "
            f"are {layers}"
        )
    return layers


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, layers: list[int] | None = None) -> None:
    """Copies a teacher's weights into a student, in place: some of the blocks, and the first entries of larger tensors.

    A tensor of the teacher's size is copied whole, so that a student of the teacher's width is the teacher without some
    blocks. Of a smaller matrix, the student gets the first rows and columns. Layers fused in one matrix (queries, keys
    and values; a gate and its value) are cut separately, as are concatenated input vectors. Attention heads must be as
    wide as the teacher's: a narrower student gets the first heads.

    Args:
        student: The smaller network, of the same architecture.
        teacher: The larger network.
        layers: As in `layer_map`.

    Raises:
        ValueError: When a student's tensor has no counterpart or is larger than it, or its heads have another width.

    Source:
        Sanh et al., 2019, "DistilBERT", arXiv:1910.01108, section 2 (blocks). The width is simply truncated, without
        choosing by importance as in `structured`.

    Example:
        >>> class Layer(nn.Linear, __import__("lit_llm.blocks", fromlist=["Block"]).Block): pass
        >>> teacher, student = (nn.Sequential(*(Layer(4, 4) for _ in range(n))) for n in (4, 2))
        >>> inherit(student, teacher)
        >>> torch.equal(student[0].weight, teacher[1].weight), torch.equal(student[1].weight, teacher[3].weight)
        (True, True)
    """
    widths = [_head_width(network) for network in (student, teacher)]
    if None not in widths and widths[0] != widths[1]:
        raise ValueError(f"student must have heads as wide as its teacher's, {widths[1]}, but has {widths[0]}")
    which = layer_map(student, teacher, layers)
    names = {module: name for network in (student, teacher) for name, module in network.named_modules()}
    theirs = blocks_of(teacher)
    within = {
        f"{names[block]}.": f"{names[theirs[layer]]}." for block, layer in zip(blocks_of(student), which, strict=True)
    }
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        mine = next((prefix for prefix in within if name.startswith(prefix)), "")
        theirs_name = within[mine] + name.removeprefix(mine) if mine else name
        if theirs_name not in source:
            raise ValueError(f"student must be of its teacher's architecture, but the teacher has no {theirs_name}")
        # GPT-2's Conv1D in transformers stores its weight transposed: outputs are columns.
        turned = type(student.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D" and tensor.ndim == 2
        tensor.copy_(_cut(source[theirs_name], tensor, name, outputs=int(turned)))


def _cut(source: Tensor, target: Tensor, name: str, outputs: int) -> Tensor:
    """The first entries of `source` in the target's shape; `outputs` is the dimension of a matrix's outputs."""
    small = source.ndim == target.ndim and all(a <= b for a, b in zip(target.shape, source.shape))
    if not small:
        raise ValueError(
            f"student must be at most as large as its teacher, but its {name} is {tuple(target.shape)} where the "
            f"teacher's is {tuple(source.shape)}"
        )
    tables = (JOINED, FUSED) if outputs else (FUSED, JOINED)
    for dim, table in enumerate(tables[: source.ndim]):
        count = _parts(table, name, source, target, dim)
        source = source.unflatten(dim, (count, -1)).narrow(dim + 1, 0, target.shape[dim] // count).flatten(dim, dim + 1)
    return source[tuple(map(slice, target.shape))]


def _parts(table: dict[str, int], name: str, source: Tensor, target: Tensor, dim: int) -> int:
    """Number of pieces in a dimension that are cut separately."""
    found = next((count for part, count in table.items() if f".{part}." in f".{name}."), 1)
    return found if not source.shape[dim] % found and not target.shape[dim] % found else 1


def _head_width(network: nn.Module) -> int | None:
    """Width of an attention head; `None` if it is unknown."""
    if hasattr(network, "d_head"):
        return network.d_head
    config = getattr(network, "config", None)
    heads = getattr(network, "num_heads", None) or getattr(config, "num_attention_heads", None)
    width = getattr(network, "d_model", None) or getattr(config, "hidden_size", None)
    return getattr(config, "head_dim", None) or (width // heads if heads and width else None)
