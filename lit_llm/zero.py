"""DeepSpeed's ZeRO as a Lightning strategy; gradients are those of the mean loss over all targets of a step."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import secrets
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lit_llm.async_checkpoints import AsyncCheckpointIO
from lit_llm.checkpoint_files import (
    FOLDER,
    plain_errors,
    read_checkpoint,
    require_whole,
    seal,
    without_pickles,
    write_together,
)
from lit_llm.ranges import require_range
from lit_llm.shards import whole, whole_shape
from lit_llm.strategies import take_statistics_of_first

ELEMENTWISE = (Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, SGD)
"""Optimisers that update each value independently of the others, so that they work on flattened shards."""

BUCKET = 50_000_000
"""Values per communication bucket: a buffer of 0.2 GB in float32; DeepSpeed's default takes 2 GB."""


class Parts(NamedTuple):
    """The part of a checkpoint that DeepSpeed writes, as the `storage_options` of `AtomicCheckpointIO`.

    Attributes:
        engine: DeepSpeed's engine, which writes it.
        name: Name of the folder of this save; the same in all processes.
        group: Process group; `None` is all processes.
    """

    engine: Any
    name: str
    group: None = None

    def write(self, path: Path) -> None:
        """Writes the folder beside a checkpoint, and waits until all processes have written their files.

        Raises:
            OSError: When a process could not write.
        """
        shares = path.with_suffix(FOLDER)

        def write() -> None:
            with plain_errors(path):
                self.engine.save_checkpoint(str(shares), tag=self.name, save_latest=False)
                for file in _own(shares / self.name):
                    seal(file)

        write_together(write, shares / self.name, self.group)


def _own(folder: Path) -> list[Path]:
    """The files in a folder of DeepSpeed's checkpoints that this process writes."""
    ranks = {file: re.search(r"zero_pp_rank_(\d+)_", file.name) for file in sorted(folder.glob("*.pt"))}
    return [file for file, found in ranks.items() if int(found[1] if found else 0) == dist.get_rank()]


class DeepSpeed(DDPStrategy):
    """Shards the optimiser state over all devices, from stage 2 on also the gradients, and in stage 3 the weights.

    DeepSpeed's engine owns the gradients: it reduces, clips and applies them as flat shards without the parameters'
    shapes. Therefore the optimiser must be elementwise, all parameters are trained from the first step on, and
    callbacks that change weights or read gradients are refused. Weights are kept in float32; with `bf16-mixed` the same
    operations run in bfloat16 as under other strategies. Each process first builds the whole network in CPU memory.

    Gradients are those of summed losses until the targets of a step are counted over processes and micro-batches. The
    engine then divides by their number through its loss scale, so that the norm for clipping is that of the mean.
    Losses are those of one process with the same global batch, up to rounding, except with batch normalisation (see
    `ExactSteps`).

    Checkpoints are in DeepSpeed's own format: `NAME.ckpt` belongs together with the folder `NAME.shares/`, which must
    be visible to all processes. Training resumes only in the same stage and on the same number of devices. For
    evaluation and export the weights can be read anywhere, by DeepSpeed's own conversion.

    Args:
        stage: Stage of ZeRO.
        offload: Keep the optimiser state, and in stage 3 the weights, in CPU memory, and run optimiser steps there.
        process_group_backend: As in Lightning; `None` is the device's default.
        timeout_minutes: Minutes after which a process stops waiting for another one.

    Raises:
        ImportError: Without the package deepspeed.
        ValueError: When an argument is out of range, or the accelerator or another part of the run does not fit
            DeepSpeed.

    Source:
        Rajbhandari et al., 2020, "ZeRO", arXiv:1910.02054, section 5; Ren et al., 2021, "ZeRO-Offload",
        arXiv:2101.06840. Lightning's own `DeepSpeedStrategy` averages means of micro-batches whatever their targets.
    """

    owns_gradients = True
    """The strategy scales, clips and frees gradients; nothing else does."""

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload: bool = False,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        require_range("above 0", timeout_minutes=timeout_minutes)
        if offload and stage == 1:
            raise ValueError("offload must be false in stage 1, but is true; take stage 2 or 3")
        if importlib.util.find_spec("deepspeed") is None:
            raise ImportError(
                "package deepspeed must be installed for this strategy, but is not; pip install 'lit-llm[deepspeed]', "
                "or take configs/strategy/fsdp.yaml"
            )
        super().__init__(process_group_backend=process_group_backend, timeout=timedelta(minutes=timeout_minutes))
        self.stage, self.offload = stage, offload
        self._engine: Any = None
        self._scale = 1.0

    # Setting up.

    def setup_environment(self) -> None:
        """Connects the processes.

        Raises:
            ValueError: When the accelerator or the precision does not fit DeepSpeed.
        """
        self._require_machine()
        if (precision := self.precision_plugin.precision) not in ("32-true", "bf16-mixed"):
            raise ValueError(f"trainer.precision must be 32-true or bf16-mixed for DeepSpeed, but is {precision}")
        super().setup_environment()
        places = {"RANK": self.global_rank, "LOCAL_RANK": self.local_rank, "WORLD_SIZE": self.world_size}
        places |= {
            "MASTER_ADDR": self.cluster_environment.main_address,
            "MASTER_PORT": self.cluster_environment.main_port,
        }
        os.environ.update({name: str(value) for name, value in places.items()})  # DeepSpeed reads them
        import deepspeed

        deepspeed.init_distributed(self._process_group_backend, timeout=self._timeout)

    def _require_machine(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator):
            kind = type(self.accelerator).__name__.removesuffix("Accelerator").lower()
            raise ValueError(
                f"trainer.accelerator must be cuda for DeepSpeed, but is {kind}; configs/strategy/fsdp.yaml runs "
                f"everywhere"
            )

    def setup(self, trainer: Trainer) -> None:
        """Creates the engine; for evaluation only in stage 3, where no device holds all weights.

        Raises:
            ValueError: When a callback or an option of the run does not fit DeepSpeed.
        """
        if isinstance(self.checkpoint_io, AsyncCheckpointIO):
            raise ValueError(
                "trainer.plugins must let DeepSpeed write checkpoints, but has AsyncCheckpointIO; leave it out"
            )
        if trainer.gradient_clip_algorithm == "value":
            raise ValueError("trainer.gradient_clip_algorithm must be norm for DeepSpeed, but is value; leave it out")
        for callback in trainer.callbacks:
            if trainer.state.fn == "fit" and getattr(callback, "needs_plain_weights", False):
                raise ValueError(
                    f"trainer.callbacks must leave weights and gradients to DeepSpeed, but has "
                    f"{type(callback).__name__}; take configs/strategy/ddp.yaml"
                )
        if self.stage < 3 or trainer.state.fn == "fit":
            super().setup(trainer)
        else:
            self.accelerator.setup(trainer)
            self._make_engine()
            self.setup_precision_plugin()

    def model_to_device(self) -> None:
        """Moves the network to the device; in stage 3 later, since parameter groups depend on whole shapes."""
        if self.stage < 3:
            super().model_to_device()

    def _share_out(self) -> None:
        """Partitions the parameters over the devices, one at a time (stage 3)."""
        import deepspeed

        module = self.lightning_module
        for name, p in module.named_parameters():
            if not p.requires_grad and not name.startswith("network."):
                raise ValueError(
                    f"stage must be 1 or 2 for a {type(module).__name__}, which keeps a second network, but is 3; take "
                    f"configs/strategy/deepspeed_zero2.yaml"
                )
        if not any(hasattr(p, "ds_id") for p in module.parameters()):  # in a test after a fit it is partitioned already
            deepspeed.zero.Init(module=module, config_dict_or_path=self._config)
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Does nothing: DeepSpeed's engine replaces the DDP wrapper, and is created once there is an optimiser."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Creates the engine with the optimiser.

        Raises:
            ValueError: When the optimiser is not elementwise, or some parameters start training later.
        """
        super().setup_optimizers(trainer)
        [optimizer] = self.optimizers
        if not isinstance(optimizer, ELEMENTWISE):
            raise ValueError(
                f"model.optimizer must treat each value by itself for DeepSpeed, but is {type(optimizer).__name__}; "
                f"take torch.optim.AdamW"
            )
        if any(group.get("start") for group in optimizer.param_groups):
            raise ValueError(
                "model.adaptation must have all parameters learn from the first step on for DeepSpeed, but some wait; "
                "take configs/strategy/fsdp.yaml"
            )
        self._make_engine(optimizer)
        self.optimizers = [self._engine.optimizer]

    def _make_engine(self, optimizer: Optimizer | None = None) -> None:
        import deepspeed

        if self.stage == 3:
            self._share_out()
        index = self.root_device.index
        device = Namespace(device_rank=self.local_rank if index is None else index)
        self._engine = deepspeed.initialize(
            device, model=self.lightning_module, optimizer=optimizer, config=self._config, dist_init_required=False
        )[0]
        self.model = self._engine

    @property
    def _config(self) -> dict[str, Any]:
        trainer = self.lightning_module.trainer
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        if self.offload:
            kept = {"device": "cpu", "pin_memory": self.root_device.type == "cuda"}
            zero |= {"offload_optimizer": kept} | ({"offload_param": kept} if self.stage == 3 else {})
        config = {
            "train_micro_batch_size_per_gpu": 1,  # used only in DeepSpeed's reports
            "gradient_accumulation_steps": trainer.accumulate_grad_batches,
            "gradient_clipping": trainer.gradient_clip_val or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }
        if self.precision_plugin.precision == "bf16-mixed":
            # No layer type is listed, so that weights and gradients are not communicated in bfloat16.
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        return config

    def on_validation_start(self) -> None:
        """Makes all processes evaluate with the first one's batch-normalisation statistics, as `Sharded` does."""
        take_statistics_of_first(self.lightning_module)

    def teardown(self) -> None:
        """Destroys the engine."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine, self.optimizers = None, []
        super().teardown()

    # Stepping.

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Marks a micro-batch that is not the last of its step."""
        self._engine.set_gradient_accumulation_boundary(False)
        yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the backward pass in the engine; the loss is divided by the number of micro-batches already."""
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self._engine.backward(closure_loss, scale_wrt_gas=False)
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    def scale_gradients(self, factor: Tensor) -> None:
        """Makes the engine multiply the gradients of the next step by `factor` before it clips them."""
        self._scale = 1.0 / float(factor)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Runs the last micro-batch and the engine's step, and stores the gradient's norm as `grad_norm`."""
        self._engine.set_gradient_accumulation_boundary(True)
        loss = self.precision_plugin._wrap_closure(self.lightning_module, optimizer, closure)
        self._engine.optimizer.loss_scale = self._scale
        self._engine.step()
        self._engine.optimizer.loss_scale = self._scale = 1.0
        self.lightning_module.grad_norm = self._engine.get_global_grad_norm()
        if getattr(self._engine.optimizer, "overflow", False):  # the engine has skipped the step
            self.lightning_module.require_finite("train/grad_norm", math.inf)
        return loss

    # Checkpoints: DeepSpeed's own, and one file for the rest.

    @property
    def zero(self) -> dict[str, int]:
        """What must be the same to resume from a checkpoint."""
        return {"stage": self.stage, "devices": self.world_size}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state as meta tensors, which have only shapes: DeepSpeed writes the values."""
        state = self.lightning_module.state_dict(keep_vars=True)
        return {name: torch.empty(whole_shape(t), dtype=t.dtype, device="meta") for name, t in state.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An empty state: DeepSpeed writes it."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Lets DeepSpeed write its files; once all are written, the first process writes the rest."""
        path, name = self.broadcast((str(filepath), secrets.token_hex(8)))
        parts = Parts(self._engine, name)
        self.checkpoint_io.save_checkpoint({**checkpoint, "zero": self.stage}, path, storage_options=parts)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint of any strategy; weights and optimiser state are loaded later."""
        return read_checkpoint(Path(checkpoint_path), in_pieces=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads DeepSpeed's own weights and optimiser state for training; otherwise weights of any strategy."""
        if self.lightning_module.trainer.state.fn == "fit":
            self._go_on(Path(checkpoint["zero"]["folder"]), strict)
        elif self.stage < 3:
            state = {name: whole(tensor) for name, tensor in checkpoint["state_dict"].items()}
            self.lightning_module.load_state_dict(state, strict=strict)
        else:
            import deepspeed

            for name, own in self.lightning_module.state_dict(keep_vars=True).items():
                with torch.no_grad(), deepspeed.zero.GatheredParameters([own], modifier_rank=0):
                    if self.is_global_zero or not hasattr(own, "ds_id"):
                        own.data.copy_(whole(checkpoint["state_dict"][name]))

    def _go_on(self, folder: Path, strict: bool) -> None:
        damage = None
        try:
            for file in _own(folder):
                require_whole(file)
        except (ValueError, OSError) as error:
            damage = str(error)
        said: list[Any] = [None] * self.world_size
        dist.all_gather_object(said, damage)
        if any(said):
            raise ValueError(next(filter(None, said)))
        with without_pickles():
            self._engine.load_checkpoint(
                str(folder.parent), tag=folder.name, load_module_strict=strict, load_lr_scheduler_states=False
            )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: the engine, which setup creates, reads the checkpoint."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """False: the engine restores the optimiser."""
        return False
