"""Tensors that are shared out, over devices or files: what of one is here, all of it, and another's share of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Box = list[tuple[int, int]]
"""A part of a tensor: where it begins along each dimension, and how long it is."""


@dataclass(frozen=True)
class Pieces:
    """A tensor that lies in pieces, such as several files hold, and is read where it is asked for.

    Attributes:
        name: To speak of it.
        shape: Of the whole.
        dtype: Of the whole.
        pieces: Of each where it begins along each dimension, itself, and what to call before it is read.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    pieces: list[tuple[list[int], Tensor, Callable[[], None]]]

    def part(self, box: Box) -> Tensor:
        """A part of it.

        Raises:
            ValueError: When the pieces do not have all of that.
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
    """Whether a tensor is torch's `DTensor`, of which there is none before a second has gone into importing it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What of each tensor is on this device, to be changed in place; of a plain one all."""
    with torch.no_grad():
        return [t.to_local() if _is_dtensor(t) else t for t in tensors]


def is_shared_out(tensors: Iterable[Tensor]) -> bool:
    """Whether some are in parts on several devices."""
    return any(_is_dtensor(t) or hasattr(t, "ds_id") for t in tensors)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of all of a tensor; DeepSpeed's third stage leaves that of a parameter empty."""
    return getattr(tensor, "ds_shape", tensor.shape)


def whole(tensor: Tensor | Pieces) -> Tensor:
    """All of a tensor; for one that is shared out over devices, all processes have to ask at once."""
    if isinstance(tensor, Pieces):
        return tensor.part([(0, length) for length in tensor.shape])
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def box_of(tensor: Tensor) -> Box:
    """Which part of a tensor is here; of one that is not shared out all.

    Any number of devices may share it: dimensions of the mesh are taken from the last to the first, as FSDP2 cuts what
    tensor parallelism has left.
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
        each = -(-length // mesh.size(axis))  # as `Tensor.chunk`: the last ones get less, or nothing
        first = min(mesh.get_local_rank(axis) * each, length)
        box[placement.dim] = start + first, min(each, length - first)
    return box


def part(tensor: Tensor | Pieces, like: Tensor) -> Tensor:
    """This device's share of a whole tensor, where that is shared out as `like` is; else the tensor."""
    if isinstance(tensor, Pieces):
        return tensor.part(box_of(like))
    if not _is_dtensor(like):
        return tensor
    for dimension, (start, length) in enumerate(box_of(like)):
        tensor = tensor.narrow(dimension, start, length)
    return tensor.contiguous()


def share_to_keep(tensor: Tensor) -> tuple[list[int], Tensor] | None:
    """Where the share that is here begins, and itself; `None` where it is empty, or another device keeps the same.

    Args:
        tensor: One that is shared out.
    """
    mesh, share = tensor.device_mesh, tensor.to_local()
    copies = [axis for axis, placement in enumerate(tensor.placements) if placement.is_replicate()]
    if not share.numel() or any(mesh.get_local_rank(axis) for axis in copies):
        return None
    return [start for start, _ in box_of(tensor)], share.detach()


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A share, such as `part` gives, as the tensor that all shares are, in the form of `like`."""
    if not _is_dtensor(like):
        return tensor
    return type(like).from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, each shared out over some mesh or none."""
    groups: dict[Any, list[Tensor]] = {}
    for t in tensors:
        groups.setdefault(t.device_mesh if _is_dtensor(t) else None, []).append(t)
    norms = [whole(torch.nn.utils.get_total_norm(members)) for members in groups.values()]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)  # of none 0
