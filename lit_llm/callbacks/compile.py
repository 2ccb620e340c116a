"""Trains blocks as torch.compile makes them."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_llm.blocks import blocks_of


class Compile(Callback):
    """Compiles the network's blocks with torch.compile for training steps.

    Each block is compiled by itself, and those of one kind share what comes of it, so that the time to compile does not
    grow with the depth. A network without blocks is compiled whole. Losses are those without this up to rounding;
    checkpoints and exported models are the same. Validations, samples and tests, whose shapes vary, run as if nothing
    were compiled.

    Args:
        mode: As in torch.compile: `default`; `reduce-overhead`, which uses CUDA graphs and more memory; `max-autotune`,
            which benchmarks kernels.
        dynamic: Compile for dynamic sequence lengths and batch sizes; `None` makes a size dynamic once it changes.

    Raises:
        ValueError: When the objective looks into blocks (distillation of hidden states).

    Source:
        Ansel et al., 2024, "PyTorch 2", ASPLOS; one block at a time as in Liang et al., 2024, "TorchTitan",
        arXiv:2410.06511, section 2.2.
    """

    def __init__(
        self, mode: Literal["default", "reduce-overhead", "max-autotune"] = "default", dynamic: bool | None = None
    ) -> None:
        self.mode, self.dynamic = mode, dynamic
        self._compiled: dict[nn.Module, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what is to be compiled; the first step that reads it compiles.

        Raises:
            ValueError: When the objective looks into blocks by hooks, which come and go, or the strategy has some there
                that share sequences out.
        """
        if getattr(trainer.strategy, "sequence_parallel", False):
            raise ValueError("sequence_parallel must be false where blocks are compiled, but is true")
        for name in ("hidden_weight", "attention_weight"):
            if weight := getattr(pl_module, name, 0):
                raise ValueError(f"model.{name} must be 0 where blocks are compiled, but is {weight}")
        modules = compile_blocks(pl_module.network, mode=self.mode, dynamic=self.dynamic)
        self._compiled = {module: module._compiled_call_impl for module in modules}
        self._use(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on what is compiled is used."""
        self._use(True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation does without."""
        self._use(False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on."""
        self._use(trainer.training)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What comes after does without."""
        self._use(False)
        self._compiled = {}

    def _use(self, compiled: bool) -> None:
        for module, call in self._compiled.items():
            module._compiled_call_impl = call if compiled else None  # of which torch says nothing but `compile`


def compile_blocks(network: nn.Module, **options: Any) -> list[nn.Module]:
    """Has each block of a network, or without blocks the network, be compiled when it is first called, in place.

    Args:
        network: What is read in training.
        options: Of torch.compile.

    Returns:
        What will be compiled.
    """
    modules = blocks_of(network) or [network]
    for module in modules:
        module.compile(**options)
    return modules
