"""Base class of callbacks that show an evaluation in the run folder: the best validation of a fit, or a test."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_llm.callbacks.run_report import RunReport
from lit_llm.data.sampling import data_parallel_rank


def gather(pl_module: LightningModule, tensor: Tensor) -> Tensor:
    """The tensors of all data-parallel processes, stacked along a new first axis."""
    world_size = pl_module.trainer.world_size
    found = pl_module.all_gather(tensor) if world_size > 1 else tensor[None]
    # Tensor-parallel ranks read the same rows and are adjacent.
    return found[:: world_size // data_parallel_rank(pl_module.trainer)[1]]


class BestEvaluation(Callback, ABC):
    """Accumulates a classifier's predictions over a split and shows them in the run folder.

    At the end of a fit, shows the best validation; a later test, or a validation by itself, overwrites it. Acts on
    objectives whose steps return `predicted`, `labels` and `nats`, as those of `Classification`; ignores others.
    """

    files: ClassVar[tuple[str, ...]] = ()
    """Pictures and tables that `show` may write; they are also logged to Weights & Biases."""

    def __init__(self) -> None:
        self.best: tuple[Any, str, str] | None = None

    @abstractmethod
    def add(self, pl_module: LightningModule, said: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        """Adds a batch, without synchronising with the device."""

    @abstractmethod
    def collect(self, pl_module: LightningModule) -> Any:
        """Returns what was added, over all processes, and resets it; `None` if nothing was."""

    @abstractmethod
    def show(self, folder: Path, data: Any, found: Any, split: str, title: str, network: Any = None) -> None:
        """Writes `found`, the result on a split of the data, into `folder`; `title` names the split and the step.

        The network supplies class names if the data has none.
        """

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Adds a batch."""
        if isinstance(outputs, dict) and "predicted" in outputs:
            self.add(pl_module, outputs, batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the best validation of a fit; shows any other evaluation at once."""
        found = self.collect(pl_module)
        if found is None or trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":
            split = "test" if trainer.testing else "validation"
            self.best = found, split, f"{split} split"
            self._show(trainer)
            return
        report = next((c for c in trainer.callbacks if isinstance(c, RunReport)), None)
        if report is None or report.results.get("best/step") == trainer.global_step:
            self.best = found, "validation", f"validation split, step {trainer.global_step}"

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the best."""
        self._show(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Shows the best so far when a run is interrupted."""
        self._show(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The best so far, which a resumed run may not improve on."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best so far."""
        self.best = state_dict["best"]

    @rank_zero_only
    def _show(self, trainer: Trainer) -> None:
        if self.best is None or trainer.fast_dev_run:
            return
        best, self.best = self.best, None
        folder = Path(trainer.default_root_dir)
        self.show(folder, trainer.datamodule, *best, network=trainer.lightning_module.network)
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                _pass_on(logger, [path for name in self.files if (path := folder / name).is_file()])


def _pass_on(logger: Any, paths: list[Path]) -> None:
    """Logs pictures and tables to a logger that can show them."""
    for path in paths:
        if path.suffix == ".png":
            logger.log_image(path.stem, [str(path)])
            continue
        with path.open(newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file)
        logger.log_table(path.stem, columns, [[_value(cell) for cell in row] for row in rows])


def _value(cell: str) -> float | str:
    """The cell as a number if it is one."""
    try:
        return float(cell)
    except ValueError:
        return cell
