"""Any masked language model of transformers, with this package's interface."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from lit_llm.models.pretrained_network import PretrainedLanguageModel, answering, noise
from lit_llm.modes import evaluating

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class PretrainedMaskedLM(PretrainedLanguageModel):
    """An encoder of transformers that predicts masked tokens (BERT, RoBERTa, ELECTRA generator, ERNIE, ModernBERT, …).

    It is made from its config with fresh weights; trained weights are loaded by `checkpoints.load_model` or an
    objective's `weights`. Its model directory can be the `path` of a `PretrainedClassifier`, which takes over the
    backbone. Its repeated layers count as blocks. No code that comes with a checkpoint is run, and no pickle is read.

    Args:
        vocab_size: Number of tokens; decided by the data, and overrides the config.
        config: The content of a `config.json`, or a directory or a name on the hub that has one.
        activation_checkpointing: Recompute each block in the backward pass: less memory for more computation.

    Raises:
        FileNotFoundError: When there is no such config.
        ValueError: When it does not describe a masked language model.

    Source:
        Devlin et al., 2018, "BERT", arXiv:1810.04805, section 3.1; Wolf et al., 2019, arXiv:1910.03771.

    Example:
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> network = PretrainedMaskedLM(10, {"model_type": "bert", **size})
        >>> ids = torch.zeros(1, 3, dtype=torch.long)
        >>> network(ids).shape, network.logits_at(torch.tensor([[True, False, True]]), ids).shape
        (torch.Size([1, 3, 10]), torch.Size([2, 10]))
    """

    tasks: ClassVar[dict[str, str]] = {"AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES"}
    description = "a masked language model"

    @classmethod
    def _tables(cls) -> dict[str, Mapping[str, Any]]:
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as WITH_DECODER

        return {
            auto: {kind: name for kind, name in table.items() if kind not in WITH_DECODER}
            for auto, table in super()._tables().items()
        }

    @classmethod
    def read_config(cls, config: str | dict[str, Any], name: str = "config") -> PretrainedConfig:
        """As `Pretrained.read_config`; refuses a config with `is_decoder`."""
        made = super().read_config(config, name)
        if getattr(made, "is_decoder", False):
            raise ValueError(f"is_decoder must be false in the config of a masked {made.model_type}, but is true")
        return made

    def _adopt(self, model: PreTrainedModel) -> None:
        super()._adopt(model)
        self._head_is_apart: bool | None = None
        self._reads_documents: bool | None = None

    def read_tokens_of(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Rebuilds fresh weights if the tokeniser's padding token is not the config's."""
        config, padding = self.config.get_text_config(), tokenizer.pad_token_id
        if padding is not None and config.pad_token_id != padding:
            config.pad_token_id = padding
            self._build()

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        document_ids: Int[Tensor, "batch seq"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the token at each position.

        Args:
            input_ids: Tokens, without padding.
            document_ids: Document of each token: attention is confined to it.
            positions: Index of each token in its sequence; default: in its row.

        Raises:
            ValueError: When `document_ids` is given, but the network cannot keep documents apart.
        """
        return self.model(**self._translated(input_ids, document_ids, positions)).logits

    def logits_at(
        self,
        selected: Bool[Tensor, "batch seq"] | tuple[Int[Tensor, " selected"], Int[Tensor, " selected"]],
        input_ids: Int[Tensor, "batch seq"],
        document_ids: Int[Tensor, "batch seq"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
    ) -> Float[Tensor, "selected vocab"]:
        """Logits of selected positions, row by row, without computing the logits of the others.

        The head reads the backbone's output at these positions alone. The first call tests on one row whether this
        gives the same logits. If not, since the head mixes positions, all logits are computed after all.

        Args:
            selected: Mask of the positions, or the indices of their rows and columns.
            input_ids: As in `forward`.
            document_ids: As in `forward`.
            positions: As in `forward`.
        """
        words, base = self._translated(input_ids, document_ids, positions), self.model.base_model
        if self._head_is_apart is None:
            row = tree_map(lambda t: t[:1], words)
            self._head_is_apart = base is not self.model and self._finds_its_head_apart(row)
        if not self._head_is_apart:
            return self.model(**words).logits[selected]
        return self._head_at(selected, base(**words), words)

    def _head_at(self, selected: Any, given: Any, words: dict[str, Any]) -> Tensor:
        given["last_hidden_state"] = given[0][selected][None]
        with answering(self.model.base_model, given):
            return self.model(**words).logits[0]

    @torch.no_grad()
    def _finds_its_head_apart(self, words: dict[str, Any]) -> bool:
        """Whether the head gives the same logits for a few positions, far apart, as for all."""
        ids = words["input_ids"]
        places = torch.arange(0, ids.shape[1], max(1, ids.shape[1] // 2), device=ids.device)
        selected = torch.zeros_like(places), places
        try:
            with evaluating(self.model), torch.autocast(ids.device.type, enabled=False):
                expected = self.model(**words).logits[selected]
                said = self._head_at(selected, self.model.base_model(**words), words)
        except Exception:  # heads fail in various ways without an input they need
            return False
        return said.shape == expected.shape and bool((said - expected).abs().max() <= noise(expected))

    def _translated(self, input_ids: Tensor, document_ids: Tensor | None, positions: Tensor | None) -> dict[str, Any]:
        """The arguments for transformers' `forward`."""
        words: dict[str, Any] = {"input_ids": input_ids}
        if positions is not None:
            words["position_ids"] = positions.expand_as(input_ids) + self.first_position
        if document_ids is not None:
            if self._reads_documents is None:
                self._reads_documents = self._keeps_documents_apart(input_ids[:1, :1])
            if not self._reads_documents:
                raise ValueError(
                    f"network must be made of attention over given positions to keep documents apart, but a "
                    f"{type(self.model).__name__} is not; set data.mask_documents to false"
                )
            words["attention_mask"] = self._masks(document_ids)
        return words

    def _masks(self, document_ids: Int[Tensor, "batch seq"]) -> Any:
        """The mask for each kind of layer."""
        mask = document_ids[:, None, :, None] == document_ids[:, None, None, :]
        config = self.config.get_text_config()
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        if not (kinds and window):
            return self._form(mask)
        place = torch.arange(mask.shape[-1], device=mask.device)
        near = (place[:, None] - place).abs() <= window
        return {"full_attention": self._form(mask), "sliding_attention": self._form(mask & near)}

    @torch.no_grad()
    def _keeps_documents_apart(self, one: Int[Tensor, "1 1"]) -> bool:
        """Whether two documents packed into a row give the logits of each alone, found by running the network once."""
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return False
        ids = (one + torch.arange(4, device=one.device)) % self.vocab_size
        places = torch.tensor([[0, 1, 0, 1]], device=ids.device) + self.first_position
        masks = self._masks(torch.tensor([[0, 0, 1, 1]], device=ids.device))
        try:
            with evaluating(self.model), torch.autocast(one.device.type, enabled=False):
                each = [self.model(ids[:, here], position_ids=places[:, :2]).logits for here in (slice(2), slice(2, 4))]
                together = self.model(ids, position_ids=places).logits
                packed = self.model(ids, position_ids=places, attention_mask=masks).logits
        except Exception:  # networks fail in various ways on a mask they cannot read
            return False
        alone = torch.cat(each, dim=1)
        return bool((packed - alone).abs().max() <= 0.01 * (together - alone).abs().max() + noise(alone))
