"""Base classes of the networks of transformers, with this package's interface.

This module and its neighbours named `pretrained…` are the only ones in `models` that import transformers.
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
"""Names of task heads, which checkpoints on the hub often have and a network for another task does not read."""


class Pretrained(nn.Module):
    """A network of transformers for one kind of task, made from a config; weights have transformers' names.

    A subclass names the task, takes its size as first argument, and implements `forward`. No code that comes with a
    checkpoint is run, and no pickle is read. Repeated layers count as blocks.

    Args:
        config: Config of the network, with its final size.
        activation_checkpointing: Recompute each block in the backward pass: less memory for more computation.
    """

    tasks: ClassVar[dict[str, str]]
    """Transformers' `Auto…` classes that build such networks, each with the name of its table of architectures."""

    description: ClassVar[str]
    """What such a network is, for error messages."""

    def __init__(self, config: PretrainedConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        text = config.get_text_config()
        if (getattr(text, "pad_token_id", None) or 0) >= getattr(text, "vocab_size", math.inf):
            # The architecture's default, for its original vocabulary.
            text.pad_token_id = None if may_lack(text, "pad_token_id") else 0
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self._is_trained = False
        self._build()

    def _build(self) -> None:
        """Builds the network that the config describes, with fresh weights."""
        try:
            made = self._auto(self.config).from_config(
                self._plain_config(), dtype=torch.get_default_dtype(), trust_remote_code=False
            )
        except KeyError as error:  # an unknown activation or kind of positions, for example
            raise ValueError(f"config must name what transformers has, but names {error}") from error
        self._adopt(made)

    def _plain_config(self) -> PretrainedConfig:
        """The config from which the network is built."""
        return copy.deepcopy(self.config)

    def _adopt(self, model: PreTrainedModel) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.model = model.train()  # `from_pretrained` returns it in evaluation mode
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
            new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # the name in later versions
            getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
        self._find_first_position()

    def _find_first_position(self) -> None:
        kin = counting_from_padding(self.model)
        self.first_position = kin.padding_idx + 1 if kin else 0
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_seq_len = longest - self.first_position if longest and longest > 0 else None  # -1 means any, too

    def recall_tokens(self, config: Mapping[str, Any]) -> None:
        """Restores what `read_tokens_of` had set, from the config in a checkpoint; does not rebuild weights.

        A network rebuilt for evaluation knows only its original config. Models like RoBERTa count positions from the
        padding token.
        """
        kin, padding = counting_from_padding(self.model), config.get("pad_token_id")
        if kin and padding is not None:
            self.config.pad_token_id = kin.padding_idx = padding
            self._find_first_position()

    @property
    def backbone(self) -> nn.Module | None:
        """The network without its head; `None` if transformers does not separate them."""
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

    # Architectures.

    @classmethod
    def _tables(cls) -> dict[str, Mapping[str, Any]]:
        from transformers.models.auto import modeling_auto

        return {auto: getattr(modeling_auto, table) for auto, table in cls.tasks.items()}

    @classmethod
    def builds(cls, architecture: str) -> bool:
        """Whether the class of transformers with this name is a network of this kind."""
        known = [names for table in cls._tables().values() for names in table.values()]
        return any(architecture == names or (isinstance(names, tuple) and architecture in names) for names in known)

    @classmethod
    def _auto(cls, config: PretrainedConfig) -> Any:
        import transformers

        return getattr(transformers, next(auto for auto, table in cls._tables().items() if config.model_type in table))

    @classmethod
    def read_config(cls, config: str | dict[str, Any], name: str = "config") -> PretrainedConfig:
        """The config of such a network.

        Args:
            config: The content of a `config.json`, or a directory or a name on the hub that has one.
            name: Its name in errors.

        Raises:
            FileNotFoundError: When there is no such config.
            ValueError: When it does not describe such a network.
        """
        made = read_config(config, name)
        if not any(made.model_type in table for table in cls._tables().values()):
            raise ValueError(f"model_type must be that of {cls.description}, but is {made.model_type}")
        return made

    # Model directories.

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments that a checkpoint needs: the content of the config instead of its path."""
        return {"config": self.to_hf_config(), "activation_checkpointing": bool(self.activation_checkpointing)}

    def to_hf_config(self) -> dict[str, Any]:
        """The `config.json` from which transformers builds the same network."""
        return {**self.config.to_dict(), "architectures": [type(self.model).__name__]}

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Pretrained:
        """The network that a `config.json` of transformers describes, with fresh weights."""
        return cls(**cls.hf_arguments(config))

    def save_weights(self, folder: Path) -> None:
        """Writes the weights in transformers' format."""
        with _quietly():
            self.model.save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """Loads the weights of a model directory of transformers.

        Heads for other tasks and stored attention masks are skipped, as transformers does.

        Raises:
            ValueError: When a tensor is missing, left over or of another shape.
        """
        model, found = self._read_weights(str(folder), self.model.config, local_files_only=True)
        for name, there, here in sorted(found["mismatched_keys"]):
            raise ValueError(
                f"model must have {name} of shape {list(here)}, but {folder} has it of shape {list(there)}"
            )
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
        """A network with the weights found at a place, and a report of missing, unexpected and misshapen ones."""
        try:
            with _quietly(), torch.device("cpu"):  # else weights would go to the default device
                return cls._auto(config).from_pretrained(
                    source,
                    config=config,
                    dtype=torch.get_default_dtype(),
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are in the report
                    **options,
                )
        except (RuntimeError, OSError, SafetensorError) as error:
            raise ValueError(
                f"model must hold the network's tensors as .safetensors, but {source} does not: {first_line(error)}"
            ) from error


class FullPrecision(nn.Linear):
    """A linear layer exempt from autocast: in bfloat16, a head's outputs would have only three significant digits."""

    def forward(self, x: Tensor) -> Tensor:
        """As `torch.nn.Linear`, in the dtype of the weights."""
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return super().forward(x.to(self.weight.dtype))
        with torch.autocast(kind, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class PretrainedLanguageModel(Pretrained, ABC):
    """A network of transformers that computes logits of tokens.

    Args:
        vocab_size: Number of tokens; decided by the data, and overrides the config.
        config: The content of a `config.json`, or a directory or a name on the hub that has one.
        activation_checkpointing: Recompute each block in the backward pass: less memory for more computation.
    """

    def __init__(self, vocab_size: int, config: str | dict[str, Any], activation_checkpointing: bool = False) -> None:
        made = self.read_config(config)
        made.get_text_config().vocab_size = vocab_size
        super().__init__(made, activation_checkpointing)

    @abstractmethod
    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of tokens."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.config.get_text_config().vocab_size

    @classmethod
    def hf_arguments(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments for the network that a `config.json` of transformers describes."""
        return {"vocab_size": cls.read_config(config).get_text_config().vocab_size, "config": config}

    def _form(self, mask: Tensor) -> Tensor:
        """A mask, true where a query may attend, in the form that the attention implementation takes."""
        if self.model.config._attn_implementation == "eager":  # adds it to the scores
            dtype = next(self.model.parameters()).dtype
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask


def _goes_unread(model: nn.Module, name: str) -> bool:
    """Whether a stored tensor that the network does not have can be skipped without changing its output.

    That is true of a head that the network lacks, unless it is inside a numbered layer, and of the mask that attention
    layers stored in older versions.
    """
    modules, parts = dict(model.named_modules()), name.split(".")
    places = [".".join(parts[:length]) for length in range(1, len(parts))]
    new = next((number for number, place in enumerate(places) if place not in modules), None)
    if new is not None:
        return parts[new] in HEADS and not any(part.isdigit() for part in parts[:new])
    is_mask = parts[-1] in ("bias", "masked_bias") and parts[-2:-1] in (["attn"], ["attention"])
    return is_mask and not any(True for _ in modules[places[-1]].parameters(recurse=False))


def _repeated(model: nn.Module) -> set[type]:
    """The classes of repeated layers: the elements of each outermost `ModuleList` with elements of one class."""
    found: set[type] = set()
    inside: set[nn.Module] = set()
    for module in model.modules():
        kinds = {type(child) for child in module} if isinstance(module, nn.ModuleList) else set()
        if len(kinds) == 1 and module not in inside and kinds != {nn.ModuleList}:  # look into lists of lists
            found |= kinds
            inside.update(module.modules())
    return found


def counting_from_padding(model: PreTrainedModel) -> nn.Module | None:
    """The embeddings of a model like RoBERTa, whose positions start after the padding token's id; else `None`."""
    embeddings = getattr(model.base_model, "embeddings", None)
    return embeddings if hasattr(embeddings, "create_position_ids_from_inputs_embeds") else None


def noise(logits: Tensor) -> Tensor:
    """Bound on the difference that rounding alone makes between logits."""
    return 30 * torch.finfo(logits.dtype).eps * logits.abs().max()


@contextmanager
def answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Replaces a module's `forward` by one that returns `answer`."""
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
    except Exception as error:  # architectures validate their configs in various ways
        if isinstance(config, str):
            raise FileNotFoundError(
                f"{name} must be a directory with a config.json or a name on the hub, but is {config}: "
                f"{first_line(error)}"
            ) from error
        raise ValueError(
            f"{name} must describe a network of transformers, but does not: {first_line(error)}"
        ) from error


def may_lack(config: PretrainedConfig, name: str) -> bool:
    """Whether a token id may be `None` in a config, which a few architectures refuse."""
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    try:
        setattr(copy.copy(config), name, None)
    except StrictDataclassFieldValidationError:
        return False
    return True


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences transformers' progress bars and reports of missing weights, which the callers judge themselves."""
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
