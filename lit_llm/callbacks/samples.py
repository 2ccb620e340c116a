"""Texts that the model generates during training."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_llm.data.tokenizer import boundary_id, first_id
from lit_llm.files import replacing
from lit_llm.generation import generate, require_possible

log = logging.getLogger(__name__)

STEP = re.compile(r"^--- step (\d+)$", re.MULTILINE)


class Samples(Callback):
    """Samples continuations of a few prompts after each validation, and writes all of them to `samples.txt`.

    Args:
        prompts: Texts to continue; an empty one starts a document.
        max_new_tokens: Maximum number of new tokens; fewer if the context is full.
        temperature: As in `generation.sample`.
        top_p: As in `generation.sample`.
        seed: Random seed, the same at each step, so that samples differ only by what the model has learnt.
    """

    def __init__(
        self,
        prompts: list[str],
        max_new_tokens: int = 64,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_p, self.seed = temperature, top_p, seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the prompts can be continued.

        Raises:
            ValueError: When a prompt is longer than the network's context, or another value is out of range.
        """
        network = pl_module.evaluated
        if self.prompts and _cannot_write(network) is None:
            ids = self._ids(trainer)
            require_possible(network, ids, self._num_new(network, ids), self.temperature, None, self.top_p, self.seed)

    def _ids(self, trainer: Trainer) -> list[list[int]]:
        tokenizer = trainer.datamodule.tokenizer
        first = first_id(tokenizer)
        return [[first, *tokenizer.encode(prompt, add_special_tokens=False)] for prompt in self.prompts]

    def _num_new(self, network: nn.Module, ids: list[list[int]]) -> int:
        room = (getattr(network, "max_seq_len", None) or sys.maxsize) - max(map(len, ids))
        return max(0, min(self.max_new_tokens, room))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On resuming, removes samples of steps after the one that the run resumes from."""
        if trainer.is_global_zero:
            self._cut(trainer, trainer.global_step + 1)

    def _cut(self, trainer: Trainer, first: int) -> None:
        """Removes the samples of step `first` and later."""
        path = Path(trainer.default_root_dir) / "samples.txt"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if later := next((m for m in STEP.finditer(text) if int(m[1]) >= first), None):
            with replacing(path) as new:
                new.write_text(text[: later.start()], encoding="utf-8")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates and writes the samples."""
        if not self.prompts or trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != "fit":
            return
        if reason := _cannot_write(pl_module.evaluated):
            log.info(f"No samples: {reason}")
            self.prompts = []
            return
        tokenizer, ids = trainer.datamodule.tokenizer, self._ids(trainer)
        texts = generate(
            pl_module.evaluated,
            ids,
            self._num_new(pl_module.evaluated, ids),
            self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=boundary_id(tokenizer),
            device=pl_module.device,
        )
        if not trainer.is_global_zero:  # all ranks generate, since weights may be sharded
            return
        lines = [f"--- step {trainer.global_step}"]
        lines += [tokenizer.decode(prompt[1:] + text) + "\n" for prompt, text in zip(ids, texts, strict=True)]
        rows = [[trainer.global_step, p, tokenizer.decode(text)] for p, text in zip(self.prompts, texts, strict=True)]
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):  # Weights & Biases shows it as a table
                logger.log_text("samples", ["step", "prompt", "text"], rows, step=trainer.global_step)
        self._cut(trainer, trainer.global_step)  # a repeated step repeats its validation
        with (Path(trainer.default_root_dir) / "samples.txt").open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        log.info("\n".join("  | " + line for line in lines[1].rstrip().splitlines()))


def _cannot_write(network: nn.Module) -> str | None:
    """Why a network cannot generate texts; `None` if it can."""
    if not hasattr(network, "new_cache"):
        return f"a {type(network).__name__} has no new_cache to write texts with"
    try:
        network.new_cache(1, 1)
    except ValueError as error:  # a transformers model without this way of decoding
        return str(error)
    return None
