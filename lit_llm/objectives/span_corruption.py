"""Span corruption: generate the spans that were removed from a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_llm.adaptation import Adaptation
from lit_llm.batch import IGNORE_INDEX, TokenBatch
from lit_llm.metrics import TokenPrediction
from lit_llm.objectives.masking import chances, noise_spans
from lit_llm.objectives.seq2seq import TeacherForcing
from lit_llm.ranges import require_at_least, require_range
from lit_llm.schedulers import Schedule


class SpanCorruption(TeacherForcing):
    """Minimises the cross-entropy of spans that were removed from a row, each replaced by a sentinel.

    The encoder reads the rest of the row, with `<extra_id_0>`, `<extra_id_1>`, … in place of the spans. The decoder
    predicts each sentinel followed by its span. Both end with the end token. Rows of equal length give sources of equal
    length and targets of equal length, so nothing is padded. The spans are a function of the seed, the step and the
    row, as in `MaskedLM`; in an evaluation they are a function of the seed and the row.

    Logs `val/loss` (nats per target token), `val/perplexity` and `val/accuracy` (fraction of target tokens that are the
    most probable, given those before them), and the same under `test/`.

    Args:
        network: Makes an encoder-decoder from the number of tokens; called with `input_ids` and `labels`, it returns
            logits of the labels. `None` is the network of `weights`.
        optimizer: Makes the optimiser from parameter groups; `None` is AdamW with a learning rate of 1e-3.
        schedule: Factor on the learning rates at each step; `None` is constant.
        decay_embeddings: Apply weight decay to embeddings too.
        weights: Weights to start from: a model directory, a run folder, a checkpoint file or a name on the hub.
        adaptation: Which parameters are trained, from when on and how fast; `None` trains all of them alike.
        vocab_size: Number of tokens of the network; `None` is that of the tokeniser. A larger number leaves room for
            new tokens or for a size that is faster.
        mask_ratio: Fraction of removed tokens, in (0, 1).
        mean_span: Mean number of tokens of a span, at least 1.
        mask_seed: Seed of the spans.

    Raises:
        ValueError: When a value is out of range, or the tokeniser has no end token or too few sentinels.
        TypeError: When the network is of another kind.

    Source:
        Raffel et al., 2020, "T5", arXiv:1910.10683, section 3.1.4 and figure 2, with its 15 % and spans of 3 tokens. As
        in their code, a row ends with a span, so the target has no final sentinel. Unlike in T5, rows are not
        lengthened beforehand to fill the encoder's length.
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
        mask_ratio: float = 0.15,
        mean_span: float = 3.0,
        mask_seed: int = 0,
    ) -> None:
        super().__init__(network, optimizer, schedule, decay_embeddings, weights, adaptation, label_smoothing=0.0)
        require_range("in (0, 1)", "model.", mask_ratio=mask_ratio)
        require_at_least(1, "model.", mean_span=mean_span)
        self.save_arguments()
        self.mask_ratio, self.mean_span, self.mask_seed = mask_ratio, mean_span, mask_seed
        self.val_metric, self.test_metric = TokenPrediction(), TokenPrediction()

    def setup(self, stage: str) -> None:
        """Takes the network's size and the sentinels from the data."""
        super().setup(stage)
        data = self.trainer.datamodule
        if (tokenizer := getattr(data, "tokenizer", None)) is not None:
            spec = getattr(data, "tokenizer_spec", None) or type(tokenizer).__name__
            if tokenizer.eos_token_id is None or "<extra_id_0>" not in tokenizer.get_vocab():
                raise ValueError(
                    f"data.tokenizer must have an end token and sentinels (<extra_id_0>, …) for SpanCorruption, but "
                    f"{spec} has none; set it to t5-bpe-4096"
                )
            self.read_tokens_of(tokenizer)

    def read_tokens_of(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the sentinels, in their order, and the end token from the tokeniser."""
        vocab, sentinels = tokenizer.get_vocab(), []
        while (token := vocab.get(f"<extra_id_{len(sentinels)}>")) is not None:
            sentinels.append(token)
        self.register_buffer("sentinels", torch.tensor(sentinels), persistent=False)
        self.end_token = tokenizer.eos_token_id

    def texts(self, batch: TokenBatch, step: int | None = None) -> dict[str, Tensor]:
        """Source and target of each row, with sentinels in each in place of the tokens of the other.

        Raises:
            ValueError: When a row needs more sentinels than there are.
        """
        ids = batch["input_ids"]
        seq = ids.shape[1]
        num_hidden, num_spans = self._numbers(seq)
        if num_spans > len(self.sentinels):
            raise ValueError(
                f"data.seq_len must be short enough for the tokeniser's {len(self.sentinels)} sentinels, but is {seq}, "
                f"which has {num_spans} spans"
            )
        chance = chances(ids, (self.mask_seed,) if step is None else (self.mask_seed, step), count=2)
        hidden, first = noise_spans(chance, num_hidden, num_spans)
        named = self.sentinels[(first.cumsum(dim=1) - 1).clamp(min=0)]
        # Padding is no target.
        beyond = torch.zeros_like(hidden)
        beyond[:, 1:] = batch["labels"][:, :-1] == IGNORE_INDEX
        read = torch.where(first, named, ids)[~hidden | first].view(len(ids), -1)
        both = torch.stack([named, ids.masked_fill(beyond, IGNORE_INDEX)], dim=-1)
        written = both[torch.stack([first, hidden], dim=-1)].view(len(ids), -1)
        end = torch.full_like(ids[:, :1], self.end_token)
        return {"input_ids": torch.cat([read, end], dim=1), "labels": torch.cat([written, end], dim=1)}

    def planned_texts(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Texts of the same lengths, without content."""
        ids = batch["input_ids"]
        rows, seq = ids.shape
        num_hidden, num_spans = self._numbers(seq)
        lengths = {"input_ids": seq - num_hidden + num_spans + 1, "labels": num_hidden + num_spans + 1}
        return {name: ids.new_zeros(rows, length) for name, length in lengths.items()}

    def _numbers(self, seq: int) -> tuple[int, int]:
        """Number of tokens removed from a row, and number of spans."""
        num_hidden = min(max(round(seq * self.mask_ratio), 1), seq - 1)
        return num_hidden, max(min(round(num_hidden / self.mean_span), seq - num_hidden), 1)

    def measure(self, metric: TokenPrediction, batch: TokenBatch) -> None:
        """Adds the nats of each target token."""
        self.tell(metric, batch)

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> NoReturn:
        """Refuses, because this objective predicts nothing of a whole row."""
        raise ValueError(
            "model must be an objective that predicts something of each row, but is SpanCorruption; name its model "
            "directory as model.weights of a Seq2Seq"
        )
