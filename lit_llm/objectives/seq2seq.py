"""Sequence to sequence: write a text from another."""

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
from lit_llm.schedulers import Schedule


class TeacherForcing(Objective):
    """Minimises the cross-entropy of each token of a text to be written, from the text read and the tokens before it.

    A subclass says what is read and written of a batch. Arguments are explained where it names them.

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
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing must be in [0, 1), but is {label_smoothing}")
        self.label_smoothing = label_smoothing

    @abstractmethod
    def texts(self, batch: Any, step: int | None = None) -> dict[str, Tensor]:
        """What is read and written of a batch, as the network takes it: `input_ids`, `labels`, `attention_mask`.

        Args:
            batch: What the data gives.
            step: Of the training; `None` in an evaluation.
        """

    def build(self) -> None:
        """Makes the network, and sees that it is an encoder-decoder."""
        super().build()
        if not hasattr(self.network, "generate"):
            kind, name = type(self).__name__, type(self.network).__name__
            raise TypeError(f"model.network must be an encoder-decoder for {kind}, but is a {name}")

    def loss(self, batch: Any) -> Loss:
        """Cross-entropy in nats, smoothed where wanted, summed over the tokens to be written, and their number."""
        return self._loss_of(self.texts(batch, self.trainer.global_step))

    def planned_loss(self, batch: Any) -> Loss:
        """The same of texts without content."""
        return self._loss_of(self.planned_texts(batch))

    def planned_texts(self, batch: Any) -> dict[str, Tensor]:
        """Texts of the shapes that `texts` gives; a subclass overrides it whose texts depend on what they hold."""
        return self.texts(batch)

    def _loss_of(self, texts: dict[str, Tensor]) -> Loss:
        logits, labels = self.reading(**texts).flatten(0, 1).float(), texts["labels"].flatten()
        total = F.cross_entropy(
            logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=self.label_smoothing
        )
        return total, (labels != IGNORE_INDEX).sum().float()

    def tell(self, metric: TokenPrediction, batch: Any) -> None:
        """Adds the nats of each token to be written."""
        texts = self.texts(batch)
        wanted = texts["labels"] != IGNORE_INDEX
        logits, labels = self.reading(**texts)[wanted].float(), texts["labels"][wanted]
        metric.update(F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1) == labels)


class Seq2Seq(TeacherForcing):
    """Minimises the cross-entropy of each token of an example's target, from its source and the tokens before it.

    Logs `val/loss` (nats per token of the targets, not smoothed), `val/perplexity`, `val/accuracy` (fraction of these
    tokens that is most probable, the ones before being given), and of the texts that the network writes by itself for
    the first examples of the split, held against their whole targets, `val/exact_match`, `val/rouge_l`, `val/bleu` and
    `val/chrf`; the same under `test/`. `predict` writes a text for each example.

    Args:
        network: Makes an encoder-decoder from the number of tokens. Called with `input_ids`, `labels` and
            `attention_mask`, it returns logits of the labels; its `generate` writes text. `None` is the network of
            `weights`.
        optimizer: As in `Objective`.
        schedule: As in `Objective`.
        decay_embeddings: As in `Objective`.
        weights: As in `Objective`.
        adaptation: As in `Objective`.
        vocab_size: Tokens of the network; `None` is as many as the tokeniser. More leave room for growth or alignment.
        label_smoothing: Probability spread over all tokens, in [0, 1); 0.1 is usual.
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
        for name, value in (
            ("num_generated", num_generated),
            ("max_new_tokens", max_new_tokens),
            ("num_beams", num_beams),
        ):
            if value < 1:
                raise ValueError(f"model.{name} must be at least 1, but is {value}")
        self.save_arguments()
        self.num_generated, self.max_new_tokens, self.num_beams = num_generated, max_new_tokens, num_beams
        self.val_metric, self.test_metric = GeneratedText(), GeneratedText()

    def texts(self, batch: Seq2SeqBatch, step: int | None = None) -> dict[str, Tensor]:
        """Source and target, as they are."""
        return {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}

    def measure(self, metric: GeneratedText, batch: Seq2SeqBatch) -> None:
        """Adds the nats of each token of the targets, and the first examples' texts."""
        self.tell(metric.tokens, batch)
        first = batch["rows"] < self.num_generated
        own = bool(first.any())
        if not self.trainer.strategy.reduce_boolean_decision(own, all=False):
            return
        if not own:  # writes with the others all the same: a network may be in pieces
            first[0] = True
        written = self.write({name: tensor[first] for name, tensor in batch.items()})
        if own:
            metric.update(written, self._wanted(batch, first, "test" if metric is self.test_metric else "validation"))

    def _wanted(self, batch: Seq2SeqBatch, first: Tensor, split: str) -> list[str]:
        """The targets of some examples, whole where the data gives them; else as far as they are labels.

        They are as the tokeniser reads them: no network writes two spaces where it makes one of them.
        """
        whole = getattr(self.trainer.datamodule, "targets", None)
        if whole is None:
            return self._decoded(batch["labels"][first])
        tokenizer = copy.deepcopy(self.trainer.datamodule.tokenizer)  # that it does not cut becomes a state of it
        return self._texts(encode_documents(tokenizer, whole(split, batch["rows"][first].tolist())))

    def write(self, batch: Seq2SeqBatch) -> list[str]:
        """What the network writes for each source."""
        made = self.reading.generate(batch["input_ids"], batch["attention_mask"], self.max_new_tokens, self.num_beams)
        return self._decoded(made)

    def _decoded(self, tokens: Tensor) -> list[str]:
        return self._texts(tokens.masked_fill(tokens < 0, self.trainer.datamodule.tokenizer.pad_token_id))

    def _texts(self, tokens: Tensor | list[list[int]]) -> list[str]:
        decoded = self.trainer.datamodule.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def predict_step(self, batch: Seq2SeqBatch, batch_idx: int) -> dict[str, Any]:
        """The text written for each row; see `callbacks.predictions`."""
        return {"rows": batch["rows"], "texts": self.write(batch)}
