"""Inputs of exported networks: their names, their dynamic shapes, and random examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedTokenizerBase


class Served(nn.Module):
    """A network as it is exported: with named inputs, and logits as its output.

    Args:
        network: The network, in evaluation mode.
    """

    names: ClassVar[tuple[str, ...]]
    """Names of the inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class ServedTokens(Served):
    """A causal language model: logits of the token after each position."""

    names = ("input_ids",)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Gives logits of each position; padding on the right does not change those before it."""
        return self.network(input_ids=input_ids)


class ServedWords(Served):
    """A masked language model, whose rows may be padded."""

    names = ("input_ids", "attention_mask")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Gives logits of each position."""
        return self.network.model(input_ids=input_ids, attention_mask=attention_mask).logits


class ServedTexts(Served):
    """A classifier of texts."""

    names = ("input_ids", "attention_mask")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Gives logits of each text."""
        return self.network(input_ids=input_ids, attention_mask=attention_mask)


class ServedPairs(Served):
    """A classifier of texts or pairs that also reads which of two texts each token belongs to."""

    names = ("input_ids", "attention_mask", "token_type_ids")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Gives logits of each text, or pair."""
        return self.network(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)


class ServedImages(Served):
    """A classifier of images."""

    names = ("pixel_values",)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Gives logits of each image."""
        return self.network(pixel_values=pixel_values)


def served_of(network: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> Served:
    """Wraps a network with the inputs of its kind."""
    if hasattr(network, "image_shape"):
        return ServedImages(network).eval()
    if hasattr(network, "logits_at"):
        return ServedWords(network).eval()
    if hasattr(network, "vocab_size"):
        return ServedTokens(network).eval()
    with_types = tokenizer is not None and "token_type_ids" in tokenizer.model_input_names
    return (ServedPairs if with_types else ServedTexts)(network).eval()


def _longest(network: nn.Module) -> int | None:
    """Maximum number of tokens of a text; `None` if unlimited."""
    longest = getattr(network, "max_seq_len", None)
    return longest if longest is not None and longest > 0 else None


def reader(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase | None, processor: dict[str, Any] | None
) -> Callable[[int, int], dict[str, Tensor]]:
    """A function from numbers of rows and tokens to random inputs, new at each call; later rows are padded more."""
    generator = torch.Generator().manual_seed(0)
    if hasattr(network, "image_shape"):
        shape = _image_shape(network, processor)
        return lambda batch, _: {"pixel_values": torch.randn(batch, *shape, generator=generator)}
    config = getattr(network, "config", None)
    size = getattr(network, "vocab_size", None)
    if size is None and config is not None:
        size = config.get_text_config().vocab_size
    if size is None:
        raise ValueError(
            f"model must have its number of tokens as an attribute vocab_size to be exported, but is a "
            f"{type(network).__name__} without"
        )
    padding = getattr(config and config.get_text_config(), "pad_token_id", None)
    padding = tokenizer.pad_token_id if padding is None and tokenizer is not None else padding
    separator, longest = getattr(config, "sep_token_id", None), _longest(network)

    def read(batch: int, seq: int) -> dict[str, Tensor]:
        seq = seq if longest is None else min(seq, longest)
        ids = torch.randint(size, (batch, seq), generator=generator)
        ids[ids == padding] = (padding or 0) + (1 if (padding or 0) + 1 < size else -1)
        types = (torch.arange(seq) > seq // 2).long().expand(batch, seq).contiguous()
        if separator is not None and separator < size:
            ids[:, seq // 2] = ids[:, -1] = separator
        lengths = (seq - 2 * torch.arange(batch)).clamp(min=1)
        mask = (torch.arange(seq) < lengths[:, None]).long()
        ids = torch.where(mask.bool(), ids, padding or 0)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types * mask}

    return read


def _image_shape(network: nn.Module, processor: dict[str, Any] | None) -> tuple[int, int, int]:
    from lit_llm.data.image_processor import ImageProcessor

    channels, height, width = network.image_shape
    if height is None:
        height, width = ImageProcessor.from_hf(processor).shape[1:] if processor is not None else (224, 224)
    return channels, height, width


def dynamic_shapes(served: Served) -> dict[str, dict[int, Any]]:
    """The dynamic axes of each input: rows, and tokens up to the network's maximum length."""
    rows = {0: Dim("batch", min=1)}
    if "pixel_values" not in served.names:
        rows[1] = Dim("seq", min=1, max=_longest(served.network))
    return dict.fromkeys(served.names, rows)
