"""Restricts the last layer of transformers' encoders to the first position if the head reads nothing else."""

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
"""Architectures whose classifiers have such a head, and whose layers have BERT's structure."""


def compute_what_is_read(model: PreTrainedModel) -> bool:
    """Makes the last layer of a classifier compute, after its attention, only the position that the head reads.

    The outputs at the other positions are unused, so logits and gradients are the same with three quarters fewer
    matmul operations in that layer. While the layer has forward hooks, all positions are computed.

    Args:
        model: Any classifier of transformers; left unchanged if it is not one of `FAMILIES`.

    Returns:
        Whether the model was changed.
    """
    fits = model.config.model_type in FAMILIES and type(model).__name__.endswith("ForSequenceClassification")
    fits = fits and not model.config.chunk_size_feed_forward  # which must divide the positions
    if fits:
        last = model.base_model.encoder.layer[-1]
        last.attention.output.register_forward_pre_hook(_Cut(last))
    return fits


@dataclass
class _Cut:
    """Passes on only the first position. (Not a closure: in a copied network it must refer to the copied layer.)"""

    layer: nn.Module

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self.layer._forward_hooks else tuple(x[:, :1] for x in args)
