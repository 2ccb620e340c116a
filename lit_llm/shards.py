"""Tensors that are shared out over devices: what of one is here, all of it, and the share that another's is of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def _is_shared_out(tensor: Tensor) -> bool:
    """Whether a tensor is torch's `DTensor`, of which there is none before a second has gone into importing it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What of each tensor is on this device, to be changed in place; of a plain one all."""
    with torch.no_grad():
        return [t.to_local() if _is_shared_out(t) else t for t in tensors]


def is_shared_out(tensors: Iterable[Tensor]) -> bool:
    """Whether some are in parts on several devices."""
    return any(_is_shared_out(t) for t in tensors)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; for one that is shared out, all processes have to ask at once."""
    return tensor.full_tensor() if _is_shared_out(tensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This device's share of a whole tensor, where that is shared out as `like` is; else the tensor.

    Any number of devices may share it: dimensions of the mesh are taken from the last to the first, as FSDP2 cuts what
    tensor parallelism has left.
    """
    if not _is_shared_out(like):
        return tensor
    mesh = like.device_mesh
    for axis in reversed(range(mesh.ndim)):
        placement = like.placements[axis]
        if placement.is_replicate():
            continue
        chunks = tensor.chunk(mesh.size(axis), placement.dim)
        here = mesh.get_local_rank(axis)
        empty = tensor.narrow(placement.dim, 0, 0)
        tensor = chunks[here] if here < len(chunks) else empty
    return tensor.contiguous()


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A share, such as `part` gives, as the tensor that all shares are, in the form of `like`."""
    if not _is_shared_out(like):
        return tensor
    return type(like).from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, each shared out over some mesh or none."""
    groups: dict[Any, list[Tensor]] = {}
    for t in tensors:
        groups.setdefault(t.device_mesh if _is_shared_out(t) else None, []).append(t)
    norms = [whole(torch.nn.utils.get_total_norm(members)) for members in groups.values()]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)  # of none 0
