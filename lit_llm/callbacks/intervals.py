"""How much was measured, and how far what was measured can be trusted."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_llm.callbacks.best_evaluation import gather
from lit_llm.metrics import bootstrap_interval


class ConfidenceIntervals(Callback):
    """Reports of a validation or test by itself how many examples it counted, and an interval for each mean.

    `test/count` is the number of examples (rows, of a language model), each counted once whatever the number of
    processes; `test/accuracy_low` and `test/accuracy_high` hold the metric in 95 of 100 resamplings of those examples.
    Of classifiers that is said of `accuracy` and `loss`, of language models of `loss` and `bits_per_byte`, with the
    number of `tokens`. Validations within a fit are left alone.
    """

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._names: tuple[str, ...] = ()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keeps a few numbers of each example, without waiting for the device."""
        if trainer.state.fn == "fit" or not isinstance(outputs, dict):
            return
        if "predicted" in outputs:
            hits, nats = (outputs["predicted"] == outputs["labels"]).double(), outputs["nats"].double()
            columns = {"accuracy": hits, "loss": nats, "examples": torch.ones_like(nats)}
        elif "row_nats" in outputs:
            columns = {"loss": outputs["row_nats"].double(), "tokens": outputs["row_tokens"].double()}
            if "num_bytes" in batch:
                columns["bytes"] = batch["num_bytes"].double()
        else:
            return
        self._names = tuple(columns)
        self._values.append(torch.stack(list(columns.values()), dim=1))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports."""
        split = "test" if trainer.testing else "val"
        if trainer.state.fn != "fit" and (found := self._collected(pl_module)):
            pl_module.report({f"{split}/{name}": torch.tensor(value) for name, value in found.items()})

    on_test_epoch_end = on_validation_epoch_end

    def _collected(self, pl_module: LightningModule) -> dict[str, float]:
        """The metrics of what all processes kept, which is forgotten."""
        sizes = gather(pl_module, torch.tensor(sum(map(len, self._values)), device=pl_module.device))
        if not sizes.min():  # nothing to say of such examples, or fewer of them than processes
            self._values = []
            return {}
        mine = torch.cat(self._values)
        padded = mine.new_zeros(int(sizes.max()), mine.shape[1])
        padded[: len(mine)] = mine
        every = gather(pl_module, padded)
        values = torch.cat([rows[: int(size)] for rows, size in zip(every, sizes, strict=True)]).cpu()
        columns = dict(zip(self._names, values.unbind(dim=1), strict=True))
        self._values = []
        found = {"count": float(len(values))}
        weight = columns["tokens"] if "tokens" in columns else columns["examples"]
        means = {name: (columns[name], weight) for name in ("accuracy", "loss") if name in columns}
        if "tokens" in columns:
            found["tokens"] = float(weight.sum())
        if "bytes" in columns:
            means["bits_per_byte"] = (columns["loss"], columns["bytes"] * torch.tensor(2.0).double().log())
        for name, (total, per) in means.items():
            found[f"{name}_low"], found[f"{name}_high"] = bootstrap_interval(total, per)
        return found
