"""Causal language modelling: predict the next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_llm.adaptation import Adaptation
from lit_llm.batch import IGNORE_INDEX, TokenBatch
from lit_llm.metrics import LanguageModeling
from lit_llm.objectives.exact_steps import Loss
from lit_llm.objectives.losses import cross_entropy_sum, linear_cross_entropy_sum, token_nats
from lit_llm.objectives.objective import Objective
from lit_llm.ranges import require_at_least, require_range
from lit_llm.schedulers import Schedule


class CausalLM(Objective):
    """Minimises the cross-entropy of each next token.

    Logs `val/loss` (nats per token), `val/perplexity` and `val/bits_per_byte` over the whole split; for a mixture of
    sources also `val/<source>/loss` and `val/<source>/bits_per_byte`; and the same under `test/`. `predict` returns the
    nats of each label.

    Args:
        network: Makes a language model from the number of tokens. Called with `input_ids`, `document_ids` and
            `positions`, it returns logits; its `hidden`, if it has one, returns the input of its `lm_head`. `None` is
            the network of `weights`.
        optimizer: Makes the optimiser from parameter groups; `None` is AdamW with a learning rate of 1e-3.
        schedule: Factor on the learning rates at each step; `None` is constant.
        decay_embeddings: Apply weight decay to embeddings too.
        weights: Weights to start from: a model directory, a run folder, a checkpoint file or a name on the hub.
        adaptation: Which parameters are trained, from when on and how fast; `None` trains all of them alike.
        vocab_size: Number of tokens of the network; `None` is that of the tokeniser. A larger number leaves room for
            new tokens or for a size that is faster.
        label_smoothing: Probability spread evenly over all tokens, in [0, 1).
        z_loss: Weight of the squared log of the softmax's denominator; 0 for none, 1e-4 is usual.

    Raises:
        ValueError: When a value is out of range, or rows are longer than the network's `max_seq_len`.

    Source:
        Bengio et al., 2003, "A Neural Probabilistic Language Model", eq. 1.
    """

    size_name: ClassVar[str] = "vocab_size"

    shares_vocabulary: ClassVar[bool] = True
    """Whether a strategy may set `vocabulary_group`, so that its devices compute the loss together."""

    vocabulary_group: Any = None
    """Process group whose devices read the same batch and each compute the logits of a part of the vocabulary."""

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
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(network, optimizer, schedule, decay_embeddings, weights, adaptation)
        require_range("in [0, 1)", "model.", label_smoothing=label_smoothing)
        require_at_least(0, "model.", z_loss=z_loss)
        self.save_arguments()
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.val_metric, self.test_metric = LanguageModeling(), LanguageModeling()

    def setup(self, stage: str) -> None:
        """Takes the network's size from the data, and the names of its sources, each of which is measured by itself."""
        super().setup(stage)
        if sources := getattr(self.trainer.datamodule, "sources", None):
            self.val_metric, self.test_metric = LanguageModeling(sources), LanguageModeling(sources)

    def logits(self, batch: TokenBatch) -> Any:
        """The network's logits of each next token."""
        return self.reading(**_inputs(batch))

    def loss(self, batch: TokenBatch) -> Loss:
        """Cross-entropy in nats with smoothing and z-loss, summed over the labels, and their number.

        If the network has `hidden` and `lm_head`, the logits are computed in chunks and never held all at once.
        """
        labels = batch["labels"]
        targets = (labels != IGNORE_INDEX).sum().float()
        network = self.reading
        if hasattr(network, "hidden"):
            hidden, weight = network.hidden(**_inputs(batch)), network.lm_head.weight
            smoothing, group = self.label_smoothing, self.vocabulary_group
            return linear_cross_entropy_sum(hidden, weight, labels, smoothing, self.z_loss, group), targets
        return cross_entropy_sum(self.logits(batch), labels, self.label_smoothing, self.z_loss), targets

    def measure(self, metric: LanguageModeling, batch: TokenBatch) -> dict[str, Tensor]:
        """Adds the nats of each label and the number of bytes of each row."""
        nats = token_nats(self.logits(batch), batch["labels"])
        metric.update(nats, batch["labels"], batch.get("num_bytes"), batch.get("sources"))
        return {"row_nats": nats.sum(dim=1), "row_tokens": (batch["labels"] != IGNORE_INDEX).sum(dim=1)}

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Any]:
        """The nats of each label and the document it belongs to; see `callbacks.predictions`."""
        return {
            "nats": token_nats(self.logits(batch), batch["labels"]),
            "labels": batch["labels"],
            "documents": batch["documents"],
        }


def _inputs(batch: TokenBatch) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "document_ids", "positions") if name in batch}
