"""Number of examples and confidence intervals of an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_llm.callbacks.best_evaluation import gather
from lit_llm.metrics import bootstrap_interval


class ConfidenceIntervals(Callback):
    """Reports the number of examples and a 95 % bootstrap interval of each mean, for a test or a separate validation.

    `test/count` is the number of examples (rows, for a language model), each counted once whatever the number of
    processes. `test/accuracy_low` and `test/accuracy_high` enclose the metric in 95 of 100 resamplings of the examples.
    Classifiers get intervals of `accuracy` and `loss`; language models of `loss` and `bits_per_byte`, and the number
    of `tokens`. Does nothing in validations within a fit.
    """

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._names: tuple[str, ...] = ()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keeps a few numbers per example, without synchronising with the device."""
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
        """Reports the counts and intervals."""
        split = "test" if trainer.testing else "val"
        if trainer.state.fn != "fit" and (found := self._collected(pl_module)):
            pl_module.report({f"{split}/{name}": torch.tensor(value) for name, value in found.items()})

    on_test_epoch_end = on_validation_epoch_end

    def _collected(self, pl_module: LightningModule) -> dict[str, float]:
        """Computes the metrics from what all processes kept, and forgets it."""
        sizes = gather(pl_module, torch.tensor(sum(map(len, self._values)), device=pl_module.device))
        if not sizes.min():  # the objective returns no such outputs, or there are fewer examples than processes
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
