"""The last layer of transformers' encoders below heads that read the first position alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = frozenset(
    {"bert", "camembert", "data2vec-text", "electra", "ernie", "esm", "megatron-bert", "rembert", "roberta"}
    | {"roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"}
)
"""Architectures whose classifiers have such a head, and layers built as BERT's are."""


def compute_what_is_read(model: PreTrainedModel) -> bool:
    """Has the last layer of a classifier compute, after its attention, only the position that the head reads.

    What it makes of the others serves nobody: logits and gradients are the same for three quarters fewer of that
    layer's matrix products. A hook on the layer gets all positions.

    Args:
        model: Any classifier of transformers. What is not of `FAMILIES` stays as it is.

    Returns:
        Whether it does so now.
    """
    fits = model.config.model_type in FAMILIES and type(model).__name__.endswith("ForSequenceClassification")
    fits = fits and not model.config.chunk_size_feed_forward  # which must divide the positions
    if fits:
        last = model.base_model.encoder.layer[-1]
        last.attention.output.register_forward_pre_hook(_Cut(last))
    return fits


@dataclass
class _Cut:
    """Hands on the first position. (No closure: a copied network's must look at the copied layer.)"""

    layer: nn.Module

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self.layer._forward_hooks else tuple(x[:, :1] for x in args)
