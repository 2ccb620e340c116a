"""Any encoder-decoder of transformers, with this package's interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_llm.models.pretrained_network import PretrainedLanguageModel
from lit_llm.modes import evaluating

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
"""Entries of a config with the special tokens that decoding depends on."""


class PretrainedSeq2Seq(PretrainedLanguageModel):
    """An encoder-decoder of transformers that generates a text from another (T5, BART, …).

    It is made from its config with fresh weights; trained weights are loaded by `checkpoints.load_model` or an
    objective's `weights`. Its repeated layers count as blocks. No code that comes with a checkpoint is run, and no
    pickle is read.

    Args:
        vocab_size: Number of tokens; decided by the data, and overrides the config.
        config: The content of a `config.json`, or a directory or a name on the hub that has one.
        activation_checkpointing: Recompute each block in the backward pass: less memory for more computation.

    Raises:
        FileNotFoundError: When there is no such config.
        ValueError: When it does not describe an encoder-decoder.

    Source:
        Raffel et al., 2020, "T5", arXiv:1910.10683, section 2.1; Wolf et al., 2019, arXiv:1910.03771.

    Example:
        >>> size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        >>> network = PretrainedSeq2Seq(10, {"model_type": "t5", **size})
        >>> source, target = torch.ones(1, 5, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
        >>> network(source, target).shape
        torch.Size([1, 3, 10])
    """

    tasks: ClassVar[dict[str, str]] = {"AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"}
    description = "an encoder-decoder"

    @classmethod
    def read_config(cls, config: str | dict[str, Any], name: str = "config") -> PretrainedConfig:
        """As `Pretrained.read_config`; the decoder's start token defaults to the padding token."""
        made = super().read_config(config, name)
        if getattr(made, "decoder_start_token_id", None) is None:
            made.decoder_start_token_id = made.pad_token_id
        return made

    def read_tokens_of(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Rebuilds fresh weights if the tokeniser's padding or end token is not the config's.

        The decoder starts with the padding token if the config says so, as T5's does, else with the end token (BART).
        """
        config = self.config
        starts_with_the_end = config.decoder_start_token_id != config.pad_token_id
        padding, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        tokens = {
            "pad_token_id": padding,
            "eos_token_id": end,
            "decoder_start_token_id": end if starts_with_the_end else padding,
        }
        if any(getattr(config, name) != token for name, token in tokens.items()):
            config.update(tokens)
            self._build()

    def recall_tokens(self, config: Mapping[str, Any]) -> None:
        """As `Pretrained.recall_tokens`, for the padding, end and start tokens."""
        self.config.update({name: config[name] for name in TOKENS if config.get(name) is not None})

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch new"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch new vocab"]:
        """Logits of each token of the target, given the source and the target tokens before it.

        Args:
            input_ids: Tokens of the source.
            labels: Tokens of the target; less than 0 on padding, which comes last.
            attention_mask: 1 on tokens of the source, 0 on padding.
        """
        before = labels.roll(1, dims=1).clamp(min=0)
        before[:, 0] = self.config.decoder_start_token_id
        return self.model(input_ids, attention_mask=attention_mask, decoder_input_ids=before, use_cache=False).logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        max_new_tokens: int = 64,
        num_beams: int = 1,
    ) -> Int[Tensor, "batch new"]:
        """Generates a text for each source by greedy decoding or beam search.

        Args:
            input_ids: Tokens of the source.
            attention_mask: As in `forward`.
            max_new_tokens: Maximum number of generated tokens.
            num_beams: Number of beams; 1 is greedy decoding.

        Returns:
            The generated tokens including the end token, then padding.
        """
        from transformers import GenerationConfig

        how = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            decoder_start_token_id=self.config.decoder_start_token_id,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
        )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self.model.generation_config = how  # else the checkpoint's would be merged in
        with evaluating(self.model):
            return self.model.generate(input_ids, attention_mask=attention_mask)[:, 1:]
