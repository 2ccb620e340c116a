"""Masked language modelling: predict masked tokens."""

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
from lit_llm.ranges import require_range
from lit_llm.schedulers import Schedule


class MaskedLM(Objective):
    """Minimises the cross-entropy of masked tokens, given the tokens before and after them.

    About `mask_ratio` of the tokens of each row are chosen: 80 % of these become the mask token, 10 % a random token,
    and 10 % are unchanged. Special tokens are never chosen. The choice is a function of the seed, the step and the row,
    so it differs in each epoch, and a resumed run makes the same choices. In an evaluation it is a function of the seed
    and the row. The first and last token of a row become the tokeniser's `[CLS]` and `[SEP]`, if it has them, because
    the network will find them around any text that it reads later.

    Logs `val/loss` (nats per chosen token), `val/accuracy` (fraction of chosen tokens that are the most probable) and
    `val/perplexity`, and the same under `test/`.

    Args:
        network: Makes a masked language model from the number of tokens. Its `logits_at`, called with a mask of the
            chosen tokens, `input_ids`, `document_ids` and `positions`, returns their logits. `None` is the network of
            `weights`.
        optimizer: Makes the optimiser from parameter groups; `None` is AdamW with a learning rate of 1e-3.
        schedule: Factor on the learning rates at each step; `None` is constant.
        decay_embeddings: Apply weight decay to embeddings too.
        weights: Weights to start from: a model directory, a run folder, a checkpoint file or a name on the hub.
        adaptation: Which parameters are trained, from when on and how fast; `None` trains all of them alike.
        vocab_size: Number of tokens of the network; `None` is that of the tokeniser. A larger number leaves room for
            new tokens or for a size that is faster.
        mask_ratio: Probability that a token is chosen, in (0, 1); 0.15 in BERT, 0.3 in ModernBERT.
        whole_words: Choose either all tokens of a word or none.
        mask_seed: Seed of the choice.

    Raises:
        ValueError: When a value is out of range, or the tokeniser has no mask token.
        TypeError: When the network is of another kind.

    Source:
        Devlin et al., 2018, "BERT", arXiv:1810.04805, section 3.1; dynamic masking: Liu et al., 2019, "RoBERTa",
        arXiv:1907.11692, section 4.1; whole words: Cui et al., 2019, arXiv:1906.08101, section 2. Each token (word) is
        chosen independently, as in transformers' collator, whereas BERT masks a fixed number in each row. A random
        token is never a special one.
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
        require_range("in (0, 1)", "model.", mask_ratio=mask_ratio)
        self.save_arguments()
        self.mask_ratio, self.whole_words, self.mask_seed = mask_ratio, whole_words, mask_seed
        self.val_metric, self.test_metric = TokenPrediction(), TokenPrediction()

    def setup(self, stage: str) -> None:
        """Takes the network's size and the special tokens from the data."""
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
        """Takes from the tokeniser which tokens may be chosen, and what replaces them."""
        self.mask_token = tokenizer.mask_token_id
        self.edge_tokens = tokenizer.cls_token_id, tokenizer.sep_token_id
        ordinary = ordinary_tokens(tokenizer)
        self.register_buffer("is_ordinary", ordinary, persistent=False)
        self.register_buffer("ordinary_tokens", ordinary.nonzero()[:, 0], persistent=False)
        edges = word_edges(tokenizer) if self.whole_words else None
        self.register_buffer("word_edges", edges, persistent=False)

    def build(self) -> None:
        """Makes the network, and checks that it is a masked language model."""
        super().build()
        if not hasattr(self.network, "logits_at"):
            raise TypeError(
                f"model.network must be a masked language model for MaskedLM, but is a {type(self.network).__name__}"
            )

    def hide(
        self, batch: TokenBatch, step: int | None = None
    ) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """The masked tokens that the network reads, the original tokens, and which of them are chosen.

        Args:
            batch: Rows of tokens.
            step: Training step; `None` in an evaluation, which masks the same tokens each time.
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
        """The cross-entropy of each chosen token, and whether it is the most probable one."""
        about = {name: batch[name] for name in ("document_ids", "positions") if name in batch}
        logits, labels = self.reading.logits_at(chosen, read, **about).float(), ids[chosen]
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1) == labels

    def loss(self, batch: TokenBatch) -> Loss:
        """Cross-entropy in nats, summed over the chosen tokens, and their number."""
        return self._loss_of(batch, *self.hide(batch, self.trainer.global_step))

    def planned_loss(self, batch: TokenBatch) -> Loss:
        """The loss of as many tokens as are chosen on average."""
        ids = batch["input_ids"]
        places = torch.arange(max(1, round(self.mask_ratio * ids.numel())), device=ids.device)
        return self._loss_of(batch, ids, ids, (places // ids.shape[1], places % ids.shape[1]))

    def _loss_of(self, batch: TokenBatch, read: Tensor, ids: Tensor, chosen: Any) -> Loss:
        nats, _ = self._nats(batch, read, ids, chosen)
        return nats.sum(), nats.new_tensor(len(nats))

    def measure(self, metric: TokenPrediction, batch: TokenBatch) -> None:
        """Adds the nats of each chosen token."""
        metric.update(*self._nats(batch, *self.hide(batch)))

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> NoReturn:
        """Refuses, because a masked language model predicts nothing of a whole row."""
        raise ValueError(
            "model must be an objective that predicts something of each row, but is MaskedLM; name its model directory "
            "as path of a PretrainedClassifier"
        )
