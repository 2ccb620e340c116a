"""Masked language modelling: fill in the words that are hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_llm.adaptation import Adaptation
from lit_llm.batch import TokenBatch
from lit_llm.metrics import TokenPrediction
from lit_llm.objectives.exact_steps import Loss
from lit_llm.objectives.masking import chances, ordinary_tokens, word_edges, word_starts
from lit_llm.objectives.objective import Objective
from lit_llm.schedulers import Schedule


class MaskedLM(Objective):
    """Minimises the cross-entropy of tokens that were hidden, from what stands before and after them.

    Of each row about `mask_ratio` of the tokens are chosen: 80 % of these become the mask token, 10 % another one, 10 %
    stay. Special tokens are never chosen. Which are chosen is a function of the seed, the step and the row: each
    epoch hides others, and a run that goes on from a checkpoint hides what it would have hidden. In an evaluation it is
    a function of the seed and the row. A row's first and last token become the tokeniser's `[CLS]` and `[SEP]`, where
    it has them: so the network will find them around any text that it reads later.

    Logs `val/loss` (nats per hidden token), `val/accuracy` (fraction of them that is most probable) and
    `val/perplexity`; the same under `test/`.

    Args:
        network: Makes a masked language model from the number of tokens. Its `logits_at`, called with positions,
            `input_ids`, `document_ids` and `positions`, returns logits. `None` is the network of `weights`.
        optimizer: As in `Objective`.
        schedule: As in `Objective`.
        decay_embeddings: As in `Objective`.
        weights: As in `Objective`.
        adaptation: As in `Objective`.
        vocab_size: Tokens of the network; `None` is as many as the tokeniser. More leave room for growth or alignment.
        mask_ratio: Fraction of masked tokens, in (0, 1); 0.15 in BERT, 0.3 in ModernBERT.
        whole_words: Mask either all tokens of a word or none.
        mask_seed: Seed of the masks.

    Raises:
        ValueError: When a value is out of range, or the tokeniser has no mask token.
        TypeError: When the network is of another kind.

    Source:
        Devlin et al., 2018, "BERT", arXiv:1810.04805, section 3.1; dynamic masking: Liu et al., 2019, "RoBERTa",
        arXiv:1907.11692, section 4.1; whole words: Cui et al., 2019, arXiv:1906.08101, section 2. Each token (word) is
        chosen by itself, as transformers' collator does, where BERT hides a set number in each row; and what takes a
        token's place at random is never a special token.
    """

    size_name: ClassVar[str] = "vocab_size"

    def __init__(
        self,
        network: Callable[..., nn.Module] | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        decay_embeddings: bool = False,
        weights: str | None = None,
        adaptation: Adaptation | None = None,
        vocab_size: int | None = None,
        mask_ratio: float = 0.15,
        whole_words: bool = False,
        mask_seed: int = 0,
    ) -> None:
        super().__init__(network, optimizer, schedule, decay_embeddings, weights, adaptation)
        if not 0 < mask_ratio < 1:
            raise ValueError(f"model.mask_ratio must be in (0, 1), but is {mask_ratio}")
        self.save_arguments()
        self.mask_ratio, self.whole_words, self.mask_seed = mask_ratio, whole_words, mask_seed
        self.val_metric, self.test_metric = TokenPrediction(), TokenPrediction()

    def setup(self, stage: str) -> None:
        """Takes from the data what sizes the network, and what its tokens are."""
        super().setup(stage)
        data = self.trainer.datamodule
        if (tokenizer := getattr(data, "tokenizer", None)) is not None:
            if tokenizer.mask_token_id is None:
                spec = getattr(data, "tokenizer_spec", None) or type(tokenizer).__name__
                raise ValueError(
                    f"data.tokenizer must have a mask token for MaskedLM, but {spec} has none; set it to "
                    f"bert-uncased-bpe-8192"
                )
            self.read_tokens_of(tokenizer)

    def read_tokens_of(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Learns which tokens may be hidden, and by what."""
        self.mask_token = tokenizer.mask_token_id
        self.edge_tokens = tokenizer.cls_token_id, tokenizer.sep_token_id
        ordinary = ordinary_tokens(tokenizer)
        self.register_buffer("is_ordinary", ordinary, persistent=False)
        self.register_buffer("ordinary_tokens", ordinary.nonzero()[:, 0], persistent=False)
        edges = word_edges(tokenizer) if self.whole_words else None
        self.register_buffer("word_edges", edges, persistent=False)

    def build(self) -> None:
        """Makes the network, and sees that it fills in words."""
        super().build()
        if not hasattr(self.network, "logits_at"):
            raise TypeError(
                f"model.network must be a masked language model for MaskedLM, but is a {type(self.network).__name__}"
            )

    def hide(
        self, batch: TokenBatch, step: int | None = None
    ) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """What the network reads, what stands there, and which positions it is asked for.

        Args:
            batch: Rows of tokens.
            step: Of the training; `None` in an evaluation, which hides the same each time.
        """
        ids = batch["input_ids"].clone()
        for place, token in zip((0, -1), self.edge_tokens, strict=True):
            if token is not None:
                ids[:, place] = token
        seed = (self.mask_seed,) if step is None else (self.mask_seed, step)
        choice, replacement, other = chances(ids, seed, count=3)
        if self.word_edges is not None:
            choice = choice.gather(1, word_starts(ids, self.word_edges))
        chosen = (choice < self.mask_ratio) & self.is_ordinary[ids]
        others = self.ordinary_tokens[(other * len(self.ordinary_tokens)).long()]
        read = torch.where(replacement < 0.9, others, ids).masked_fill(replacement < 0.8, self.mask_token)
        return torch.where(chosen, read, ids), ids, chosen

    def _nats(self, batch: TokenBatch, read: Tensor, ids: Tensor, chosen: Any) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each hidden token, and whether it is the most probable one."""
        about = {name: batch[name] for name in ("document_ids", "positions") if name in batch}
        logits, labels = self.reading.logits_at(chosen, read, **about).float(), ids[chosen]
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1) == labels

    def loss(self, batch: TokenBatch) -> Loss:
        """Cross-entropy in nats, summed over the hidden tokens, and their number."""
        return self._loss_of(batch, *self.hide(batch, self.trainer.global_step))

    def planned_loss(self, batch: TokenBatch) -> Loss:
        """The same of as many tokens as are hidden on average."""
        ids = batch["input_ids"]
        places = torch.arange(max(1, round(self.mask_ratio * ids.numel())), device=ids.device)
        return self._loss_of(batch, ids, ids, (places // ids.shape[1], places % ids.shape[1]))

    def _loss_of(self, batch: TokenBatch, read: Tensor, ids: Tensor, chosen: Any) -> Loss:
        nats, _ = self._nats(batch, read, ids, chosen)
        return nats.sum(), nats.new_tensor(len(nats))

    def measure(self, metric: TokenPrediction, batch: TokenBatch) -> None:
        """Adds the nats of each hidden token."""
        metric.update(*self._nats(batch, *self.hide(batch)))

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> NoReturn:
        """Refuses.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "model must be an objective that predicts something of each row, but is MaskedLM; name its model directory "
            "as path of a PretrainedClassifier"
        )
