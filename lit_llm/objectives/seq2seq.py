"""Sequence to sequence: generate a target text from a source text."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_llm.adaptation import Adaptation
from lit_llm.batch import IGNORE_INDEX, Seq2SeqBatch
from lit_llm.data.tokenizer import encode_documents
from lit_llm.metrics import GeneratedText, TokenPrediction
from lit_llm.objectives.exact_steps import Loss
from lit_llm.objectives.objective import Objective
from lit_llm.ranges import require_at_least, require_range
from lit_llm.schedulers import Schedule


class TeacherForcing(Objective):
    """Minimises the cross-entropy of each target token, given the source and the target tokens before it.

    A subclass makes source and target from a batch in `texts`.

    Args:
        network: Makes an encoder-decoder from the number of tokens; see `Built`.
        optimizer: As in `Scheduled`.
        schedule: As in `Scheduled`.
        decay_embeddings: As in `Scheduled`.
        weights: As in `Objective`.
        adaptation: As in `Scheduled`.
        label_smoothing: Probability spread evenly over all tokens, in [0, 1).

    Raises:
        ValueError: When a value is out of range.
        TypeError: When the network is of another kind.
    """

    size_name: ClassVar[str] = "vocab_size"

    def __init__(
        self,
        network: Callable[..., nn.Module] | None,
        optimizer: OptimizerCallable | None,
        schedule: Schedule | None,
        decay_embeddings: bool,
        weights: str | None,
        adaptation: Adaptation | None,
        label_smoothing: float,
    ) -> None:
        super().__init__(network, optimizer, schedule, decay_embeddings, weights, adaptation)
        require_range("in [0, 1)", "model.", label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    @abstractmethod
    def texts(self, batch: Any, step: int | None = None) -> dict[str, Tensor]:
        """Source and target of a batch, as arguments of the network: `input_ids`, `labels`, maybe `attention_mask`.

        Args:
            batch: A batch of the data module.
            step: Training step; `None` in an evaluation.
        """

    def build(self) -> None:
        """Makes the network, and checks that it is an encoder-decoder."""
        super().build()
        if not hasattr(self.network, "generate"):
            kind, name = type(self).__name__, type(self.network).__name__
            raise TypeError(f"model.network must be an encoder-decoder for {kind}, but is a {name}")

    def loss(self, batch: Any) -> Loss:
        """Cross-entropy in nats with label smoothing, summed over the target tokens, and their number."""
        return self._loss_of(self.texts(batch, self.trainer.global_step))

    def planned_loss(self, batch: Any) -> Loss:
        """The loss of texts without content."""
        return self._loss_of(self.planned_texts(batch))

    def planned_texts(self, batch: Any) -> dict[str, Tensor]:
        """Texts of the same shapes as `texts`; overridden if `texts` needs the values in the batch."""
        return self.texts(batch)

    def _loss_of(self, texts: dict[str, Tensor]) -> Loss:
        logits, labels = self.reading(**texts).flatten(0, 1).float(), texts["labels"].flatten()
        total = F.cross_entropy(
            logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=self.label_smoothing
        )
        return total, (labels != IGNORE_INDEX).sum().float()

    def tell(self, metric: TokenPrediction, batch: Any) -> None:
        """Adds the nats of each target token, and whether it is the most probable one."""
        texts = self.texts(batch)
        wanted = texts["labels"] != IGNORE_INDEX
        logits, labels = self.reading(**texts)[wanted].float(), texts["labels"][wanted]
        metric.update(F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1) == labels)


class Seq2Seq(TeacherForcing):
    """Minimises the cross-entropy of each token of an example's target, given its source and the tokens before it.

    Logs `val/loss` (nats per target token, not smoothed), `val/perplexity` and `val/accuracy` (fraction of target
    tokens that are the most probable, given those before them). Also generates texts for the first examples of the
    split and logs `val/exact_match`, `val/rouge_l`, `val/bleu` and `val/chrf` against the whole targets. The same under
    `test/`. `predict` generates a text for each example.

    Args:
        network: Makes an encoder-decoder from the number of tokens. Called with `input_ids`, `labels` and
            `attention_mask`, it returns logits of the labels; its `generate` generates tokens. `None` is the network of
            `weights`.
        optimizer: Makes the optimiser from parameter groups; `None` is AdamW with a learning rate of 1e-3.
        schedule: Factor on the learning rates at each step; `None` is constant.
        decay_embeddings: Apply weight decay to embeddings too.
        weights: Weights to start from: a model directory, a run folder, a checkpoint file or a name on the hub.
        adaptation: Which parameters are trained, from when on and how fast; `None` trains all of them alike.
        vocab_size: Number of tokens of the network; `None` is that of the tokeniser. A larger number leaves room for
            new tokens or for a size that is faster.
        label_smoothing: Probability spread evenly over all tokens, in [0, 1); 0.1 is usual.
        num_generated: Number of examples of a split for which text is generated in validation and test.
        max_new_tokens: Maximum number of generated tokens.
        num_beams: Number of beams; 1 is greedy decoding.

    Raises:
        ValueError: When a value is out of range.
        TypeError: When the network is of another kind.

    Source:
        Sutskever et al., 2014, arXiv:1409.3215, eq. 1; Raffel et al., 2020, "T5", arXiv:1910.10683.
    """

    def __init__(
        self,
        network: Callable[..., nn.Module] | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        decay_embeddings: bool = False,
        weights: str | None = None,
        adaptation: Adaptation | None = None,
        vocab_size: int | None = None,
        label_smoothing: float = 0.0,
        num_generated: int = 64,
        max_new_tokens: int = 48,
        num_beams: int = 1,
    ) -> None:
        super().__init__(network, optimizer, schedule, decay_embeddings, weights, adaptation, label_smoothing)
        counts = {"num_generated": num_generated, "max_new_tokens": max_new_tokens, "num_beams": num_beams}
        require_at_least(1, "model.", **counts)
        self.save_arguments()
        self.num_generated, self.max_new_tokens, self.num_beams = num_generated, max_new_tokens, num_beams
        self.val_metric, self.test_metric = GeneratedText(), GeneratedText()

    def build(self) -> None:
        """Makes the network, and sees that it has room for the texts that it is to write."""
        super().build()
        longest = getattr(self.network, "max_seq_len", None)
        if longest and self.max_new_tokens > longest:
            raise ValueError(
                f"model.max_new_tokens must be at most the network's max_seq_len, {longest}, but is "
                f"{self.max_new_tokens}; lower it"
            )

    def texts(self, batch: Seq2SeqBatch, step: int | None = None) -> dict[str, Tensor]:
        """Source and target of the batch, unchanged."""
        return {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}

    def measure(self, metric: GeneratedText, batch: Seq2SeqBatch) -> None:
        """Adds the nats of each target token, and the texts generated for the first examples."""
        self.tell(metric.tokens, batch)
        first = batch["rows"] < self.num_generated
        own = bool(first.any())
        if not self.trainer.strategy.reduce_boolean_decision(own, all=False):
            return
        if not own:  # generates with the other processes all the same, because the network may be sharded
            first[0] = True
        written = self.write({name: tensor[first] for name, tensor in batch.items()})
        if own:
            metric.update(written, self._wanted(batch, first, "test" if metric is self.test_metric else "validation"))

    def _wanted(self, batch: Seq2SeqBatch, first: Tensor, split: str) -> list[str]:
        """The targets of some examples: the whole texts if the data gives them, else the labels, which may be cut off.

        Texts are encoded and decoded, because a network cannot generate what the tokeniser normalises, such as two
        spaces.
        """
        whole = getattr(self.trainer.datamodule, "targets", None)
        if whole is None:
            return self._decoded(batch["labels"][first])
        tokenizer = copy.deepcopy(self.trainer.datamodule.tokenizer)  # encoding changes its truncation setting
        return self._texts(encode_documents(tokenizer, whole(split, batch["rows"][first].tolist())))

    def write(self, batch: Seq2SeqBatch) -> list[str]:
        """The text that the network generates for each source."""
        made = self.reading.generate(batch["input_ids"], batch["attention_mask"], self.max_new_tokens, self.num_beams)
        return self._decoded(made)

    def _decoded(self, tokens: Tensor) -> list[str]:
        return self._texts(tokens.masked_fill(tokens < 0, self.trainer.datamodule.tokenizer.pad_token_id))

    def _texts(self, tokens: Tensor | list[list[int]]) -> list[str]:
        decoded = self.trainer.datamodule.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def predict_step(self, batch: Seq2SeqBatch, batch_idx: int) -> dict[str, Any]:
        """The text generated for each row; see `callbacks.predictions`."""
        return {"rows": batch["rows"], "texts": self.write(batch)}
