"""Training with blocks compiled by torch.compile."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_llm.blocks import blocks_of


class Compile(Callback):
    """Compiles the network's blocks with torch.compile for training steps.

    Each block is compiled separately, and blocks of one kind share the compiled code, so that compile time does not
    grow with depth. A network without blocks is compiled as a whole. Losses are the same up to rounding; the format of
    checkpoints and exported models does not change. Validations, samples and tests, whose shapes vary, run uncompiled.

    Args:
        mode: As in torch.compile: `default`; `reduce-overhead`, which uses CUDA graphs and more memory; `max-autotune`,
            which benchmarks kernels.
        dynamic: Compile for dynamic sequence lengths and batch sizes; `None` makes a size dynamic once it changes.

    Raises:
        ValueError: When the objective reads hidden states or attention of blocks (distillation), or the strategy has
            sequence parallelism.

    Source:
        Ansel et al., 2024, "PyTorch 2", ASPLOS; one block at a time as in Liang et al., 2024, "TorchTitan",
        arXiv:2410.06511, section 2.2.
    """

    def __init__(
        self, mode: Literal["default", "reduce-overhead", "max-autotune"] = "default", dynamic: bool | None = None
    ) -> None:
        self.mode, self.dynamic = mode, dynamic
        self._compiled: dict[nn.Module, Any] = {}
        self._in_use = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Marks the blocks for compilation, which happens in the first training step.

        Raises:
            ValueError: When the objective adds and removes hooks on blocks, or the strategy shards sequences by hooks.
        """
        if getattr(trainer.strategy, "sequence_parallel", False):
            raise ValueError("sequence_parallel must be false where blocks are compiled, but is true")
        for name in ("hidden_weight", "attention_weight"):
            if weight := getattr(pl_module, name, 0):
                raise ValueError(f"model.{name} must be 0 where blocks are compiled, but is {weight}")
        modules = compile_blocks(pl_module.network, mode=self.mode, dynamic=self.dynamic)
        self._compiled = {module: module._compiled_call_impl for module in modules}
        self._use(False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Uses the compiled blocks; other callbacks that run the network after a validation use the plain ones."""
        if not self._in_use:
            self._use(True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the validation uncompiled."""
        self._use(False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs uncompiled from here on."""
        self._use(False)
        self._compiled = {}

    def _use(self, compiled: bool) -> None:
        self._in_use = compiled
        for module, call in self._compiled.items():
            module._compiled_call_impl = call if compiled else None  # private: torch has no public switch


def compile_blocks(network: nn.Module, **options: Any) -> list[nn.Module]:
    """Marks each block of a network (or the network, if it has none), in place, to be compiled at its first call.

    Args:
        network: The network to train.
        options: Options of torch.compile.

    Returns:
        The modules that will be compiled.
    """
    modules = blocks_of(network) or [network]
    for module in modules:
        module.compile(**options)
    return modules
