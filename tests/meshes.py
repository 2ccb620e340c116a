"""Simulated device meshes in one process, and copies of networks to shard over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def devices(rank: int, data: int, tensor: int) -> Iterator[DeviceMesh]:
    """A mesh of which only the device `rank` exists; its messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=data * tensor)
    try:
        yield init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data_parallel", "tensor_parallel"))
    finally:
        dist.destroy_process_group()


def copy_of(network: nn.Module) -> nn.Module:
    """A copy, with the same weights, of a network from `tiny_llama(qk_norm=True)` or `tiny_gpt2()`."""
    more = {"qk_norm": True} if hasattr(network, "qk_norm") else {}
    copy = type(network)(37, d_model=32, num_layers=2, num_heads=4, d_ff=48, max_seq_len=64, **more)
    copy.load_state_dict(network.state_dict())
    return copy
