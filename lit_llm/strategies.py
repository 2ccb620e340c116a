"""FSDP2 and tensor parallelism as one Lightning strategy, with checkpoints that any strategy reads.

DDP itself is a line of YAML (`configs/strategy/ddp.yaml`).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from lit_llm.blocks import Block
from lit_llm.checkpoint_files import Shares, cut, read_checkpoint
from lit_llm.deferred_init import materialize
from lit_llm.ranges import require_at_least, require_range
from lit_llm.shards import Pieces, part, shared_as, whole
from lit_llm.tensor_parallel import cut_products

READING = ("hidden", "logits_at", "classify", "features", "generate")
"""Methods besides `forward` through which objectives call a network: FSDP must gather the weights for them too."""


class Sharded(ModelParallelStrategy):
    """Shards weights, gradients and optimiser state over all devices, and matrix products over some of them.

    With `tensor_parallel_size` 1 this is fully sharded data parallelism (FSDP2): each device keeps a shard of every
    block, the whole block is all-gathered where it is used, and its gradients are reduce-scattered. With a larger size,
    neighbouring devices split the matrix products of each block and read the same rows; embeddings, norms and the head
    are replicated on them. The attribute `tensor_parallel` of a network's blocks says which matrices are cut by columns
    and which by rows. Of N devices, `N / tensor_parallel_size` read different rows: the global batch is
    `data.batch_size` times that number.

    Between these products each device computes the same activations, and stores them for the backward pass. With
    `sequence_parallel` it does so only for its part of each sequence: row-parallel outputs are reduce-scattered along
    the sequence, and all-gathered where layers in a block's `whole_sequence` need all positions. With `loss_parallel`
    it computes the logits of its part of the vocabulary, and the loss is combined from these. Both apply only where
    gradients are recorded; evaluation stores no activations, and its prompts may have any length.

    Losses are those of one process with the same global batch, up to rounding, except with batch normalisation (see
    `ExactSteps`). Checkpoints are gathered on the first process, or each process writes its shards; all strategies read
    both forms, on any number of devices. A new network of a class with `defers_init` is built on the meta device, and
    each device allocates only the shards that it keeps, and one whole parameter at a time.

    Args:
        tensor_parallel_size: Number of devices that split each matrix product; must divide the number of devices.
        sequence_parallel: Also split what lies between products, by position; sequence lengths must be multiples of
            `tensor_parallel_size`. The last norm is not split.
        loss_parallel: Also split the logits and the head's product, by tokens of the vocabulary. The head's weights
            stay whole on each device, since they may be tied to the embeddings.
        cpu_offload: Keep weights, gradients and optimiser state in CPU memory, and run optimiser steps there.
        sharded_checkpoints: Each process writes its shard of a checkpoint and reads what it needs; only the first one
            reads all weights, to export them. `NAME.ckpt` then belongs together with the folder `NAME.shares/`, and
            both must be visible to all processes.
        process_group_backend: As in Lightning; `None` is the device's default.
        timeout_minutes: Minutes after which a process stops waiting for another one.

    Raises:
        ValueError: When a size is out of range or does not divide what it has to, or an option needs a
            `tensor_parallel_size` above 1.

    Source:
        Zhao et al., 2023, "PyTorch FSDP", arXiv:2304.11277; Shoeybi et al., 2019, "Megatron-LM", arXiv:1909.08053,
        section 3, also for the loss; Korthikanti et al., 2022, arXiv:2205.05198, section 4.2, for sequence parallelism
        (there, embeddings and the last norm are split too, and inputs are gathered again for the backward pass instead
        of stored).
    """

    defers_init = True
    """Networks may be on the meta device until `setup` (`deferred_init`)."""

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        sequence_parallel: bool = False,
        loss_parallel: bool = False,
        cpu_offload: bool = False,
        sharded_checkpoints: bool = False,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        require_at_least(1, tensor_parallel_size=tensor_parallel_size)
        for name, asked in {"sequence_parallel": sequence_parallel, "loss_parallel": loss_parallel}.items():
            if asked and tensor_parallel_size == 1:
                raise ValueError(f"tensor_parallel_size must be at least 2 for {name}, but is 1")
        require_range("above 0", timeout_minutes=timeout_minutes)
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.tensor_parallel_size, self.cpu_offload = tensor_parallel_size, cpu_offload
        self.sharded_checkpoints = sharded_checkpoints
        self.sequence_parallel, self.loss_parallel = sequence_parallel, loss_parallel

    def setup_environment(self) -> None:
        """Connects the processes and arranges the devices in a mesh.

        Raises:
            ValueError: When the number of devices does not fit `tensor_parallel_size` or `cpu_offload`.
        """
        devices = self.num_processes * self.num_nodes
        if devices % self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size must divide the number of devices, {devices}, but is {self.tensor_parallel_size}"
            )
        self._data_parallel_size = devices // self.tensor_parallel_size
        if self._data_parallel_size == 1 and self.cpu_offload:
            raise ValueError(
                f"trainer.devices must be at least {2 * self.tensor_parallel_size} for cpu_offload, but is {devices}; "
                "no two share weights out"
            )
        super().setup_environment()
        if self.sharded_checkpoints:
            self._writers = dist.new_group(backend="gloo", timeout=self._timeout)

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # Norms of gradients in CPU memory are reduced there, which needs gloo.
        return f"cpu:gloo,cuda:{backend}" if self.cpu_offload and backend == "nccl" else backend

    def setup(self, trainer: Trainer) -> None:
        """Shards the networks before the optimiser is created.

        Raises:
            ValueError: When `loss_parallel` is set for an objective that needs all logits at once, hidden states are
                compared under tensor parallelism, or batch normalisation is to be synchronised over devices.
        """
        if self._layer_sync is not None:
            raise ValueError(
                "trainer.sync_batchnorm must be false where weights are shared out over devices, but is true; take "
                "configs/strategy/ddp.yaml"
            )
        if self.tensor_parallel_size > 1 and (weight := getattr(self.lightning_module, "hidden_weight", 0)):
            raise ValueError(
                f"model.hidden_weight must be 0 where products are shared out over devices, but is {weight}; take "
                f"configs/strategy/fsdp.yaml"
            )
        if self.loss_parallel:
            if not getattr(self.lightning_module, "shares_vocabulary", False):
                raise ValueError(
                    "loss_parallel must be false for an objective that wants all logits at once, but is true for a "
                    f"{type(self.lightning_module).__name__}"
                )
            self.lightning_module.vocabulary_group = self.device_mesh["tensor_parallel"].get_group()
        options: dict[str, Any] = (
            {"offload_policy": CPUOffloadPolicy(torch.accelerator.is_available())} if self.cpu_offload else {}
        )
        for child in self.lightning_module.children():
            for module in child if isinstance(child, nn.ModuleList) else [child]:
                plain = [not isinstance(p, DTensor) for p in module.parameters()]
                if plain and all(plain):  # in a test after a fit it is sharded already
                    share_out(module, self.device_mesh, self.sequence_parallel, **options)
                if hasattr(module, "fills"):
                    materialize(module, torch.device("cpu") if self.cpu_offload else self.root_device)
        for metric in self.lightning_module.modules():
            if isinstance(metric, Metric):  # devices that read the same rows count them once
                metric.process_group = self.device_mesh["data_parallel"].get_group()
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Moves to the device what is not sharded; shards stay where they are, with `cpu_offload` in CPU memory."""
        _update_properties(self.lightning_module, self.root_device)
        for module in self.lightning_module.modules():
            if isinstance(module, Metric):
                module.to(self.root_device)
            else:
                for name, buffer in module._buffers.items():
                    module._buffers[name] = buffer if buffer is None else buffer.to(self.root_device)
                for p in module._parameters.values():
                    if p is not None and not isinstance(p, DTensor):
                        p.data = p.data.to(self.root_device)

    def on_validation_start(self) -> None:
        """Makes all processes evaluate with the first one's batch-normalisation statistics, as in checkpoints."""
        take_statistics_of_first(self.lightning_module)

    def teardown(self) -> None:
        """Like Lightning's, and also waits for a checkpoint that is still being written."""
        if self.loss_parallel and self.lightning_module is not None:
            self.lightning_module.vocabulary_group = None
        super().teardown()
        self.checkpoint_io.teardown()

    # Checkpoints: whole, on the first process, or sharded.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state: gathered on the first process and empty on others, or sharded."""
        state = self.lightning_module.state_dict()
        return dict(state) if self.sharded_checkpoints else self._gathered(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state, in the same form."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return dict(state) if self.sharded_checkpoints else self._gathered(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint in the first process, or each process's shards of it."""
        if not self.sharded_checkpoints:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path, name = self.broadcast((str(filepath), secrets.token_hex(8)))
        rest, tensors = cut(checkpoint)
        shares = Shares(tensors, name, self._writers)
        self.checkpoint_io.save_checkpoint(rest if self.is_global_zero else {}, path, storage_options=shares)

    def _gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Gathers the tensors of a state one at a time, so that a device holds at most one whole tensor."""

        def gather(tensor: Tensor) -> Tensor | None:
            tensor = whole(tensor.detach())
            return tensor.cpu() if self.is_global_zero else None

        gathered = tree_map_only(Tensor, gather, dict(state))
        return gathered if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint of any strategy; of a sharded one, this process's parts are read later."""
        self.checkpoint_io.teardown()  # it may still be written
        return read_checkpoint(Path(checkpoint_path), in_pieces=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads this process's shard of each whole tensor."""
        own = self.lightning_module.state_dict()
        shares = {
            name: shared_as(part(t, own[name]).to(own[name].device), own[name]) if name in own else t
            for name, t in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(shares, strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning restores the optimiser as with other strategies."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this process's shards of the optimiser's state."""
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            members = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in stored["param_groups"] for number in group["params"]]
            owner = dict(zip(numbers, members, strict=False))  # the optimiser refuses a state of other parameters
            shares = {
                number: {name: _share_of(value, owner[number]) for name, value in values.items()}
                for number, values in stored["state"].items()
                if number in owner
            }
            optimizer.load_state_dict({**stored, "state": shares})


def _share_of(value: Any, p: Tensor) -> Any:
    """This process's part of an optimiser's value: a shard if it has the parameter's shape, otherwise all of it."""
    if isinstance(value, Tensor | Pieces) and value.shape == p.shape:
        return shared_as(part(value, p).to(p.device), p)
    return whole(value) if isinstance(value, Pieces) else value


def take_statistics_of_first(network: nn.Module) -> None:
    """Broadcasts the first process's running statistics of batch normalisation, in place."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            for statistic in (module.running_mean, module.running_var):
                dist.broadcast(statistic, 0)


def share_out(network: nn.Module, mesh: DeviceMesh, sequence_parallel: bool = False, **options: Any) -> None:
    """Shards a network in place over a mesh with the dimensions `data_parallel` and `tensor_parallel`.

    Args:
        network: The network; each of its `Block`s is gathered separately.
        mesh: The devices.
        sequence_parallel: As in `Sharded`.
        options: Arguments of all calls of `fully_shard`.
    """
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if tensor.size() > 1:
        cut_products(network, tensor, sequence_parallel)
    if data.size() == 1:
        return
    for p in network.parameters():  # FSDP cannot shard kernels in channels-last format
        p.data = p.data.contiguous()
    for module in reversed(list(network.modules())):  # a block within a block first
        if isinstance(module, Block):
            fully_shard(module, mesh=data, **options)
    fully_shard(network, mesh=data, **options)
    for module in network.modules():
        if hasattr(module, "generate"):  # makes transformers generate on all ranks until the last one has finished
            module._is_fsdp_managed_module = True
    for name in READING:
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)
