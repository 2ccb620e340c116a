"""Span corruption: write what was left out of a text."""

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
from lit_llm.schedulers import Schedule


class SpanCorruption(TeacherForcing):
    """Minimises the cross-entropy of spans that were left out of a row, each named by a sentinel in its place.

    Of each row the encoder reads what is kept, with `<extra_id_0>`, `<extra_id_1>`, … where a span is missing, and the
    decoder writes each sentinel and what it stands for; both end with the end token. All rows of a length become
    sources of one length and targets of one length, so nothing is padded. What is left out is a function of the seed,
    the step and the row, as in `MaskedLM`; in an evaluation of the seed and the row.

    Logs `val/loss` (nats per token of the targets), `val/perplexity` and `val/accuracy` (fraction of these tokens that
    is most probable, the ones before being given); the same under `test/`.

    Args:
        network: Makes an encoder-decoder from the number of tokens; called with `input_ids` and `labels`, it returns
            logits of the labels. `None` is the network of `weights`.
        optimizer: As in `Objective`.
        schedule: As in `Objective`.
        decay_embeddings: As in `Objective`.
        weights: As in `Objective`.
        adaptation: As in `Objective`.
        vocab_size: Tokens of the network; `None` is as many as the tokeniser. More leave room for growth or alignment.
        mask_ratio: Fraction of masked tokens, in (0, 1).
        mean_span: Mean length of a span, at least 1.
        mask_seed: Seed of the masks.

    Raises:
        ValueError: When a value is out of range, or the tokeniser has no end or too few sentinels.
        TypeError: When the network is of another kind.

    Source:
        Raffel et al., 2020, "T5", arXiv:1910.10683, section 3.1.4 and figure 2, with its 15 % and spans of 3 tokens. As
        in their code a row ends with a span, so there is no last sentinel, and rows are not made longer beforehand.
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
        if not 0 < mask_ratio < 1:
            raise ValueError(f"model.mask_ratio must be in (0, 1), but is {mask_ratio}")
        if mean_span < 1:
            raise ValueError(f"model.mean_span must be at least 1, but is {mean_span}")
        self.save_arguments()
        self.mask_ratio, self.mean_span, self.mask_seed = mask_ratio, mean_span, mask_seed
        self.val_metric, self.test_metric = TokenPrediction(), TokenPrediction()

    def setup(self, stage: str) -> None:
        """Takes from the data what sizes the network, and what its tokens are."""
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
        """Learns which tokens are sentinels, in their order."""
        vocab, sentinels = tokenizer.get_vocab(), []
        while (token := vocab.get(f"<extra_id_{len(sentinels)}>")) is not None:
            sentinels.append(token)
        self.register_buffer("sentinels", torch.tensor(sentinels), persistent=False)
        self.end_token = tokenizer.eos_token_id

    def texts(self, batch: TokenBatch, step: int | None = None) -> dict[str, Tensor]:
        """What is kept of each row and what is left out, with sentinels in each for the other.

        Raises:
            ValueError: When a row needs more sentinels than there are, or has too few tokens.
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
        # What a row was filled up with is nothing to be written.
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
        """How many tokens of a row are left out, in how many spans."""
        num_hidden = min(max(round(seq * self.mask_ratio), 1), seq - 1)
        return num_hidden, max(min(round(num_hidden / self.mean_span), seq - num_hidden), 1)

    def measure(self, metric: TokenPrediction, batch: TokenBatch) -> None:
        """Adds the nats of each token that was left out, and of the sentinels."""
        self.tell(metric, batch)

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> NoReturn:
        """Refuses.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "model must be an objective that predicts something of each row, but is SpanCorruption; name its model "
            "directory as model.weights of a Seq2Seq"
        )
