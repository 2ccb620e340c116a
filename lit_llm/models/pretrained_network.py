"""Networks of transformers under this package's contract: what those of all tasks share.

This module and its neighbours named `pretrained…` are the only ones that know transformers' networks.
"""

from __future__ import annotations

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lit_llm.blocks import Block
from lit_llm.models.pretrained_attention import attend_faster
from lit_llm.wording import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

HEADS = frozenset(
    {"pooler", "seq_relationship", "sop_classifier", "cls", "lm_head", "classifier", "score", "qa_outputs"}
    | {"discriminator_predictions", "generator_predictions", "generator_lm_head", "multiple_choice_head"}
)
"""Layers above a network that one for another task does without; models on the hub often come with several."""


class Pretrained(nn.Module):
    """A network of transformers for one kind of task: made from a config, its weights under transformers' names.

    A subclass names the task, says what decides its size, and writes `forward`. No code that comes with a checkpoint
    is run, and no pickle is read. Repeated layers count as blocks.

    Args:
        config: What it is made from, of the right size already.
        activation_checkpointing: Compute each block again in the backward pass: less memory for more computation.
    """

    tasks: ClassVar[dict[str, str]]
    """Transformers' classes that build such a network from any config, each with the table of those it builds."""

    description: ClassVar[str]
    """What such a network is, as said in errors."""

    def __init__(self, config: PretrainedConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        text = config.get_text_config()
        if (getattr(text, "pad_token_id", None) or 0) >= getattr(text, "vocab_size", math.inf):
            # An architecture's default, of its own tokens.
            text.pad_token_id = None if may_lack(text, "pad_token_id") else 0
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self._is_trained = False
        self._build()

    def _build(self) -> None:
        """Makes the network that the config describes, with fresh weights."""
        try:
            made = self._auto(self.config).from_config(
                self._plain_config(), dtype=torch.get_default_dtype(), trust_remote_code=False
            )
        except KeyError as error:  # of an activation or a kind of positions, say
            raise ValueError(f"config must name what transformers has, but names {error}") from error
        self._adopt(made)

    def _plain_config(self) -> PretrainedConfig:
        """The config as the network is built from it."""
        return copy.deepcopy(self.config)

    def _adopt(self, model: PreTrainedModel) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.model = model.train()  # from a directory it comes as for evaluation, without dropout
        attend_faster(model)
        kinds = {type(m) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)}
        for kind in kinds or _repeated(model):
            Block.register(kind)
        self.reads_images = model.main_input_name == "pixel_values"
        if self.reads_images:
            model.to(memory_format=torch.channels_last)
        if not model.supports_gradient_checkpointing:
            if self.activation_checkpointing:
                raise ValueError(
                    f"activation_checkpointing must be false for a {type(model).__name__}, which cannot, but is true"
                )
            self.activation_checkpointing = None
        if self.activation_checkpointing:
            new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # as later versions call it
            getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
        self._find_first_position()

    def _find_first_position(self) -> None:
        kin = counting_from_padding(self.model)
        self.first_position = kin.padding_idx + 1 if kin else 0
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_seq_len = longest - self.first_position if longest and longest > 0 else None  # -1 is any, too

    def recall_tokens(self, config: Mapping[str, Any]) -> None:
        """What was learnt of the tokeniser by the time a checkpoint was made, from the config that this holds.

        A network that is made again to be evaluated knows only what it is made from. RoBERTa's kin count positions from
        the padding token, with the weights as they are.
        """
        kin, padding = counting_from_padding(self.model), config.get("pad_token_id")
        if kin and padding is not None:
            self.config.pad_token_id = kin.padding_idx = padding
            self._find_first_position()

    @property
    def backbone(self) -> nn.Module | None:
        """What is below the head; `None` where transformers does not keep them apart."""
        base = self.model.base_model
        return None if base is self.model else base

    def reset_parameters(self) -> None:
        """Draws the initial weights of the architecture."""
        for module in self.model.modules():
            module._is_hf_initialized = False
        for p in self.model.parameters():
            p._is_hf_initialized = False
        self.model.tie_weights()
        self.model.initialize_weights()

    # Which networks there are.

    @classmethod
    def _tables(cls) -> dict[str, Mapping[str, Any]]:
        from transformers.models.auto import modeling_auto

        return {auto: getattr(modeling_auto, table) for auto, table in cls.tasks.items()}

    @classmethod
    def builds(cls, architecture: str) -> bool:
        """Whether a class of transformers, by its name, is a network of this kind."""
        known = [names for table in cls._tables().values() for names in table.values()]
        return any(architecture == names or (isinstance(names, tuple) and architecture in names) for names in known)

    @classmethod
    def _auto(cls, config: PretrainedConfig) -> Any:
        import transformers

        return getattr(transformers, next(auto for auto, table in cls._tables().items() if config.model_type in table))

    @classmethod
    def read_config(cls, config: str | dict[str, Any], name: str = "config") -> PretrainedConfig:
        """The config of such a network, from a `config.json`'s content or a place that has one.

        Args:
            config: The content, a directory, or a name on the hub.
            name: What an error calls it.

        Raises:
            FileNotFoundError: When there is no such place.
            ValueError: When it does not describe such a network.
        """
        made = read_config(config, name)
        if not any(made.model_type in table for table in cls._tables().values()):
            raise ValueError(f"model_type must be that of {cls.description}, but is {made.model_type}")
        return made

    # As transformers keeps them.

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's, with the config itself in place of where it came from: what a checkpoint needs."""
        return {"config": self.to_hf_config(), "activation_checkpointing": bool(self.activation_checkpointing)}

    def to_hf_config(self) -> dict[str, Any]:
        """The `config.json` with which transformers builds the same network."""
        return {**self.config.to_dict(), "architectures": [type(self.model).__name__]}

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Pretrained:
        """The network that a `config.json` of transformers describes, with fresh weights."""
        return cls(**cls.hf_arguments(config))

    def save_weights(self, folder: Path) -> None:
        """Writes the weights by the names under which transformers reads them."""
        with _quietly():
            self.model.save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """Takes the weights of a directory of transformers in place of its own.

        A head for another task and masks that the network makes itself are passed over, as transformers does.

        Raises:
            ValueError: When a tensor is missing, left over or of another shape.
        """
        model, found = self._read_weights(str(folder), self.model.config, local_files_only=True)
        unread = sorted(name for name in found["unexpected_keys"] if _goes_unread(model, name))
        extra = set(found["unexpected_keys"]) - set(unread)
        for what, names in (("lacks", found["missing_keys"]), ("also has", extra)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(
                    f"model must hold the network's tensors and no others, but {folder} {what} {min(names)}{more}"
                )
        if unread:
            more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
            log.info(
                f"Passing over what a {type(model).__name__} does not read in {folder}: {', '.join(unread[:3])}{more}"
            )
        self._is_trained = True
        self._adopt(model)

    @classmethod
    def _read_weights(
        cls, source: str, config: PretrainedConfig, **options: Any
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """A network with what a place holds of its weights, and what was missing and left over there."""
        try:
            with _quietly(), torch.device("cpu"):  # under another device transformers would place the weights
                return cls._auto(config).from_pretrained(
                    source,
                    config=config,
                    dtype=torch.get_default_dtype(),
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **options,
                )
        except (RuntimeError, OSError, SafetensorError) as error:
            raise ValueError(
                f"model must hold the network's tensors as .safetensors, but {source} does not: {first_line(error)}"
            ) from error


class FullPrecision(nn.Linear):
    """A linear layer that autocast passes over: in bfloat16 a head would give values of three digits."""

    def forward(self, x: Tensor) -> Tensor:
        """As `torch.nn.Linear`, in the precision of the weights."""
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return super().forward(x.to(self.weight.dtype))
        with torch.autocast(kind, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class PretrainedLanguageModel(Pretrained, ABC):
    """A network of transformers that gives logits of tokens; its vocabulary is decided by the data.

    Args:
        vocab_size: Number of tokens; takes the place of the config's.
        config: The content of a `config.json`, or a directory or a name on the hub that has one.
        activation_checkpointing: Compute each block again in the backward pass: less memory for more computation.
    """

    def __init__(self, vocab_size: int, config: str | dict[str, Any], activation_checkpointing: bool = False) -> None:
        made = self.read_config(config)
        made.get_text_config().vocab_size = vocab_size
        super().__init__(made, activation_checkpointing)

    @abstractmethod
    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.config.get_text_config().vocab_size

    @classmethod
    def hf_arguments(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The arguments that make the network that a `config.json` of transformers describes."""
        return {"vocab_size": cls.read_config(config).get_text_config().vocab_size, "config": config}

    def _form(self, mask: Tensor) -> Tensor:
        """A mask, true where a query may look, in the form that the attention in use takes."""
        if self.model.config._attn_implementation == "eager":  # added to the scores
            dtype = next(self.model.parameters()).dtype
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask


def _goes_unread(model: nn.Module, name: str) -> bool:
    """Whether a tensor that a network has no place for changes nothing of what the network gives.

    That is one of a head that is not there at all, beneath no numbered layer, or the mask that attention once kept.
    """
    modules, parts = dict(model.named_modules()), name.split(".")
    places = [".".join(parts[:length]) for length in range(1, len(parts))]
    new = next((number for number, place in enumerate(places) if place not in modules), None)
    if new is not None:
        return parts[new] in HEADS and not any(part.isdigit() for part in parts[:new])
    is_mask = parts[-1] in ("bias", "masked_bias") and parts[-2:-1] in (["attn"], ["attention"])
    return is_mask and not any(True for _ in modules[places[-1]].parameters(recurse=False))


def _repeated(model: nn.Module) -> set[type]:
    """The classes of layers that a network repeats: of lists of one kind of module those that are in no other such."""
    found: set[type] = set()
    inside: set[nn.Module] = set()
    for module in model.modules():
        kinds = {type(child) for child in module} if isinstance(module, nn.ModuleList) else set()
        if len(kinds) == 1 and module not in inside and kinds != {nn.ModuleList}:  # of those, look into each
            found |= kinds
            inside.update(module.modules())
    return found


def counting_from_padding(model: PreTrainedModel) -> nn.Module | None:
    """The embeddings of one of RoBERTa's kin: they count positions from the one after the padding token's id."""
    embeddings = getattr(model.base_model, "embeddings", None)
    return embeddings if hasattr(embeddings, "create_position_ids_from_inputs_embeds") else None


@contextmanager
def answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Has a module give `answer` to whatever it is asked."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def read_config(config: str | dict[str, Any], name: str = "config") -> PretrainedConfig:
    """The config of any network of transformers; see `Pretrained.read_config`."""
    from transformers import AutoConfig

    try:
        if isinstance(config, str):
            return AutoConfig.from_pretrained(str(Path(config).expanduser()), trust_remote_code=False)
        return AutoConfig.for_model(**copy.deepcopy(config))
    except Exception as error:  # each architecture checks its own in its own way
        if isinstance(config, str):
            raise FileNotFoundError(
                f"{name} must be a directory with a config.json or a name on the hub, but is {config}: "
                f"{first_line(error)}"
            ) from error
        raise ValueError(
            f"{name} must describe a network of transformers, but does not: {first_line(error)}"
        ) from error


def may_lack(config: PretrainedConfig, name: str) -> bool:
    """Whether a config may say that there is no such token; those of a few architectures refuse it."""
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    try:
        setattr(copy.copy(config), name, None)
    except StrictDataclassFieldValidationError:
        return False
    return True


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bars, and its tables of what weights were found, which are for us to judge."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
