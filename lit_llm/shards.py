"""Tensors that are sharded over devices or files: their local shards, whole values, and arbitrary parts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Box = list[tuple[int, int]]
"""A part of a tensor: its offset and length along each dimension."""


@dataclass(frozen=True)
class Pieces:
    """A tensor that is stored in pieces, in several files for example, and read part by part on demand.

    Attributes:
        name: Name for error messages.
        shape: Shape of the whole tensor.
        dtype: Data type of the whole tensor.
        pieces: Of each piece its offset along each dimension, its tensor, and a function to call before it is read.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    pieces: list[tuple[list[int], Tensor, Callable[[], None]]]

    def part(self, box: Box) -> Tensor:
        """Reads a part of the tensor.

        Raises:
            ValueError: When the pieces do not cover the part.
        """
        part, filled = torch.empty([length for _, length in box], dtype=self.dtype), 0
        for starts, piece, before in self.pieces:
            common = [
                (max(here, there), min(here + length, there + size))
                for (here, length), there, size in zip(box, starts, piece.shape, strict=True)
            ]
            if all(first < end for first, end in common):
                before()
                to, of = (
                    tuple(slice(first - start, end - start) for (first, end), start in zip(common, origin))
                    for origin in ([here for here, _ in box], starts)
                )
                part[to] = piece[of]
                filled += part[to].numel()
        if filled != part.numel():
            raise ValueError(f"ckpt_path must hold all of {self.name}, but holds {filled} of {part.numel()} values")
        return part


def _is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is torch's `DTensor`; does not import that class, which would take a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The local shard of each tensor, for changes in place; a plain tensor itself."""
    with torch.no_grad():
        return [t.to_local() if _is_dtensor(t) else t for t in tensors]


def is_shared_out(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is sharded over devices."""
    return any(_is_dtensor(t) or hasattr(t, "ds_id") for t in tensors)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor; in DeepSpeed's stage 3 a parameter's own `shape` is empty."""
    return getattr(tensor, "ds_shape", tensor.shape)


def whole(tensor: Tensor | Pieces) -> Tensor:
    """The whole tensor; for a tensor sharded over devices this is a collective call."""
    if isinstance(tensor, Pieces):
        return tensor.part([(0, length) for length in tensor.shape])
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def box_of(tensor: Tensor) -> Box:
    """The part of a tensor that this device holds; all of it if it is not sharded.

    The mesh may have several dimensions: they are applied from the last to the first, as FSDP2 shards what tensor
    parallelism leaves.
    """
    box = [(0, length) for length in tensor.shape]
    if not _is_dtensor(tensor):
        return box
    mesh = tensor.device_mesh
    for axis in reversed(range(mesh.ndim)):
        placement = tensor.placements[axis]
        if placement.is_replicate():
            continue
        start, length = box[placement.dim]
        each = -(-length // mesh.size(axis))  # as in `Tensor.chunk`: the last shards are shorter, or empty
        first = min(mesh.get_local_rank(axis) * each, length)
        box[placement.dim] = start + first, min(each, length - first)
    return box


def part(tensor: Tensor | Pieces, like: Tensor) -> Tensor:
    """This device's shard of a whole tensor if `like` is sharded; otherwise the whole tensor."""
    if isinstance(tensor, Pieces):
        return tensor.part(box_of(like))
    if not _is_dtensor(like):
        return tensor
    for dimension, (start, length) in enumerate(box_of(like)):
        tensor = tensor.narrow(dimension, start, length)
    return tensor.contiguous()


def share_to_keep(tensor: Tensor) -> tuple[list[int], Tensor] | None:
    """This device's shard to save, after its offsets; `None` if it is empty or another device saves the same.

    Args:
        tensor: A sharded tensor.
    """
    mesh, share = tensor.device_mesh, tensor.to_local()
    copies = [axis for axis, placement in enumerate(tensor.placements) if placement.is_replicate()]
    if not share.numel() or any(mesh.get_local_rank(axis) for axis in copies):
        return None
    return [start for start, _ in box_of(tensor)], share.detach()


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Makes of each device's shard, such as `part` returns, a DTensor with the layout of `like`."""
    if not _is_dtensor(like):
        return tensor
    return type(like).from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together; each may be sharded over a mesh of its own."""
    groups: dict[Any, list[Tensor]] = {}
    for t in tensors:
        groups.setdefault(t.device_mesh if _is_dtensor(t) else None, []).append(t)
    norms = [whole(torch.nn.utils.get_total_norm(members)) for members in groups.values()]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)  # 0 for no tensors
