"""Tensor parallelism splits products by columns, rows or heads; sequence parallelism splits what lies between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lit_llm.blocks import Block

STYLES = {
    "columns": ColwiseParallel,
    "rows": RowwiseParallel,
    "columns, gathered": lambda **options: ColwiseParallel(output_layouts=Replicate(), **options),
    "rows, cut": lambda **options: RowwiseParallel(input_layouts=Replicate(), **options),
}
"""How a matrix of a block is split; the further style `heads` marks weights that each device applies to its heads."""

SUMMANDS = {"output_layouts": Partial(), "use_local_output": False}
"""Options of a row-parallel matrix that leave its output as partial sums, to be reduced later."""


def cut_products(network: nn.Module, mesh: DeviceMesh, sequence_parallel: bool = False) -> None:
    """Splits the matrix products of a network's blocks over the devices of a mesh, in place.

    Args:
        network: A network whose blocks have `tensor_parallel`, a dict from names of layers to styles.
        mesh: A mesh of one dimension.
        sequence_parallel: As in `strategies.Sharded`.

    Raises:
        ValueError: When the blocks have no `tensor_parallel`, a size is not divisible by the number of devices, a layer
            has an adapter, or with `sequence_parallel` the blocks have no `whole_sequence`, or the network has dropout,
            whose masks would be the same in all parts of a sequence.
    """
    size, kind = mesh.size(), type(network).__name__
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    if not blocks or not all(hasattr(block, "tensor_parallel") for block in blocks):
        raise ValueError(
            f"tensor_parallel_size must be 1 for a network whose blocks do not say how they are cut, but is {size} for "
            f"a {kind}"
        )
    for name in ("num_heads", "num_kv_heads", "d_ff"):
        if (number := getattr(network, name, size)) % size:
            raise ValueError(f"tensor_parallel_size must divide the network's {name}, {number}, but is {size}")
    if sequence_parallel and not all(hasattr(block, "whole_sequence") for block in blocks):
        raise ValueError(
            "sequence_parallel must be false for a network whose blocks do not say what reads whole sequences, but is "
            f"true for a {kind}"
        )
    if sequence_parallel and getattr(network, "dropout", 0):
        raise ValueError(
            f"sequence_parallel must be false where devices would drop alike, but is true with the network's dropout "
            f"{network.dropout}"
        )
    cut: set[nn.Module] = set()
    for block in blocks:
        styles = {
            name: STYLES[style](**SUMMANDS if sequence_parallel and style.startswith("rows") else {})
            for name, style in block.tensor_parallel.items()
            if style in STYLES
        }
        for name in styles:
            if type(block.get_submodule(name)) is not nn.Linear:
                raise ValueError(f"tensor_parallel_size must be 1 where {name} has an adapter, but is {size}")
            cut.add(block.get_submodule(name))
        parallelize_module(block, mesh, styles, src_data_rank=None)  # all processes have the same weights
    shared: dict[nn.Parameter, nn.Parameter] = {}
    apart = set(_on_heads(blocks))
    if sequence_parallel:
        apart.update(module for block in blocks for module in block.modules())
        share_sequences(blocks, mesh)
    for module in network.modules():
        if module not in cut and any(p is not None for p in module._parameters.values()):
            _have_in_common(module, mesh, shared, module in apart)


def share_sequences(blocks: list[Block], mesh: DeviceMesh) -> None:
    """Makes each device compute what lies between the blocks' products for its part of each sequence.

    Args:
        blocks: The blocks, in order. Layers in `whole_sequence` begin with column-parallel products and end with a
            row-parallel one.
        mesh: The devices.
    """

    def placed(x: Tensor, here: Placement, there: Placement) -> DTensor:
        return DTensor.from_local(x, mesh, [here], run_check=False).redistribute(placements=[there])

    def divide(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return args
        x, size = args[0], mesh.size()
        if x.shape[1] % size:
            raise ValueError(
                f"sequence length must be a multiple of tensor_parallel_size, {size}, for sequence_parallel, but is "
                f"{x.shape[1]}; set data.seq_len"
            )
        return placed(x, Replicate(), Shard(1)).to_local(), *args[1:]

    def gather(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # (A column-parallel product takes the DTensor; its gradient is a partial sum, which is reduce-scattered.)
        return (placed(args[0], Shard(1), Replicate()), *args[1:]) if torch.is_grad_enabled() else args

    def add_up(layer: nn.Module, args: tuple[Any, ...], y: DTensor) -> Tensor:
        # (The last product gave partial sums.)
        return y.redistribute(placements=[Shard(1) if torch.is_grad_enabled() else Replicate()]).to_local()

    def put_together(block: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
        return placed(x, Shard(1), Replicate()).to_local() if torch.is_grad_enabled() else x

    for block in blocks:
        for name in block.whole_sequence:
            block.get_submodule(name).register_forward_pre_hook(gather)
            block.get_submodule(name).register_forward_hook(add_up)
    blocks[0].register_forward_pre_hook(divide)
    blocks[-1].register_forward_hook(put_together)


def _on_heads(blocks: list[Block]) -> Iterator[nn.Module]:
    """Layers whose weights each device applies, whole, to its own heads."""
    for block in blocks:
        for name, style in block.tensor_parallel.items():
            layer = block.get_submodule(name.rpartition(".")[0])
            if style == "heads" and (layer := getattr(layer, name.rpartition(".")[2])) is not None:
                yield layer


def _have_in_common(module: nn.Module, mesh: DeviceMesh, shared: dict[nn.Parameter, nn.Parameter], apart: bool) -> None:
    """Replicates a layer's weights over a mesh, so that all parameters of the network are DTensors.

    The layer computes with the local tensors. If devices apply the weights to different heads or positions (`apart`),
    gradients are summed over devices.
    """

    def reading(name: str) -> property:
        def read(layer: nn.Module) -> Tensor | None:
            p = layer._parameters[name]
            if not isinstance(p, DTensor) or p.device_mesh.ndim > 1:  # sharded by FSDP too, and not gathered now
                return p
            weight = p.to_local()
            return _SummedGradient.apply(weight, mesh.get_group()) if apart else weight

        return property(read)

    for name, p in module._parameters.items():
        if p is not None and p not in shared:
            everywhere = distribute_tensor(p.detach(), mesh, [Replicate()], src_data_rank=None)
            shared[p] = nn.Parameter(everywhere, requires_grad=p.requires_grad)
        module._parameters[name] = shared.get(p)
    kind = type(module)
    module.__class__ = type(
        kind.__name__, (kind,), {"__module__": kind.__module__} | {n: reading(n) for n in module._parameters}
    )


class _SummedGradient(torch.autograd.Function):
    """Returns weights unchanged; their gradients are summed over devices."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Returns the weight unchanged."""
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sums the gradient over devices."""
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
