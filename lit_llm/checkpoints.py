"""Saves models as directories in Hugging Face's form, and loads them from such directories and from checkpoints."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import pkgutil
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

import lit_llm.models
from lit_llm.adaptation import Adaptation
from lit_llm.checkpoint_files import own_checkpoint, plain_errors, read_checkpoint
from lit_llm.compression.compression import records_of, replay
from lit_llm.compression.quantization import convert
from lit_llm.compression.sparsity import remove_masks
from lit_llm.data.cache import cache_folder, cache_name, new_cache, read_manifest
from lit_llm.data.tokenizer import open_tokenizer, padding_id, write_tokenizer_files
from lit_llm.files import model_folder, replacing
from lit_llm.models.pretrained_network import Pretrained, may_lack
from lit_llm.recipes import built, class_path, first_argument, plain
from lit_llm.shapes import shapes_only
from lit_llm.shards import whole
from lit_llm.weights import fill, read_weights, require_whole_weights, write_weights
from lit_llm.wording import first_line

log = logging.getLogger(__name__)

IMAGE_PROCESSOR = "preprocessor_config.json"
GENERATION_CONFIG = "generation_config.json"
COMPRESSION = "compression.json"
"""File in a model directory with the records of the network's compression (`compression.compression`)."""

ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def save_model(
    folder: str | Path,
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    image_processor: dict[str, Any] | None = None,
) -> None:
    """Writes a directory that transformers opens, with `AutoModelForCausalLM`, say, and `AutoTokenizer`.

    If transformers has no class for the network, only this package opens the directory, with `load_model`.

    Args:
        folder: The directory; an earlier one is replaced only once the new one is complete.
        network: A network with `to_hf_config` and `hf_name`, and, if its parameters differ from transformers' by more
            than their names, `hf_view` or `hf_zeros` (see `models.gpt2`); or with `save_weights`.
        tokenizer: Saved beside the weights.
        card: Markdown about the model; becomes its `README.md`.
        image_processor: Preprocessing of the network's images; becomes `preprocessor_config.json`.

    Raises:
        TypeError: When transformers has no class for such a network.
    """
    folder = Path(folder)
    if not hasattr(network, "to_hf_config"):
        raise TypeError(f"network must have a form that transformers knows, but is a {type(network).__name__}")
    config = {**network.to_hf_config(), "dtype": "float32"}
    if tokenizer is not None:
        tokens = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        tokens = {f"{name}_token_id": token for name, token in tokens.items()}
        if not hasattr(network, "new_cache") and hasattr(network, "read_tokens_of"):
            # The network's config says how it finds padding.
            tokens |= {name: config[name] for name in tokens if config.get(name) is not None}
        elif getattr(network, "first_position", 0):  # its positions depend on this id
            tokens["pad_token_id"] = config["pad_token_id"]
        if isinstance(network, Pretrained):
            lacking = [name for name, token in tokens.items() if token is None]
            tokens |= {name: config[name] for name in lacking if not may_lack(network.config, name)}
        config |= tokens
    with replacing(folder) as new:
        new.mkdir()
        with plain_errors(folder):
            write_weights(network, new)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
            if hasattr(network, "new_cache"):
                _write_ends(tokenizer, tokens, new / GENERATION_CONFIG)
        if image_processor is not None:
            (new / IMAGE_PROCESSOR).write_text(json.dumps(image_processor, indent=2) + "\n")
        if records := records_of(network):
            (new / COMPRESSION).write_text(json.dumps(records, indent=2) + "\n")
        if card is not None:
            (new / "README.md").write_text(card, encoding="utf-8")


def _write_ends(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, int | None], file: Path) -> None:
    """Writes all tokens that end a text or a turn to the `generation_config.json` that transformers' `generate` reads.

    `config.json` has only the end-of-text token. A file that came with the weights takes precedence over it and may
    list more: its end tokens are kept if they are special tokens other than the beginning-of-text, unknown and mask
    tokens. In a file that transformers derived from the config, they are the architecture's default ids, which may be
    any tokens of this tokeniser, and are dropped. The padding token may be an end token, as in Qwen.
    """
    from lit_llm.data.chat import special_tokens, turn_ends  # needed for few models only

    written = json.loads(file.read_text()) if file.is_file() else {}
    told = None if written.pop("_from_model_config", None) else written.get("eos_token_id")
    ends = set(told if isinstance(told, list) else [told]) & special_tokens(tokenizer).keys()
    ends -= {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id}
    if tokenizer.chat_template:
        with contextlib.suppress(ValueError, TypeError):  # the template renders no conversation
            ends |= turn_ends(tokenizer)
    end_of_text = {tokenizer.eos_token_id} - {None}
    if ends or file.is_file():
        tokens = tokens | ({"eos_token_id": sorted(ends | end_of_text)} if ends - end_of_text else {})
        file.write_text(json.dumps(written | tokens, indent=2) + "\n")


class Model(NamedTuple):
    """A model that has been loaded.

    Attributes:
        network: The network, in evaluation mode.
        tokenizer: Its tokeniser, if one comes with it.
        recipe: `class_path` and `init_args` of the network and, as `size`, its first argument, as plain values.
        folder: The directory it is in; `None` for a checkpoint file.
    """

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    recipe: dict[str, Any]
    folder: Path | None


def load_model(path: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """Reads a network, in evaluation mode, and its tokeniser.

    Args:
        path: A model directory (ours, or transformers' of any causal language model or classifier), a run folder, a
            checkpoint file, or, as `owner/name`, a model on the hub.

    Raises:
        FileNotFoundError: When there is no model at `path`.
        ValueError: When weights and config do not fit each other, or the architecture is not known.
    """
    return read_model(path)[:2]


def load_language_model(path: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Reads a causal language model and its tokeniser, as `load_model` does.

    Raises:
        FileNotFoundError: As in `load_model`.
        ValueError: Also when the model is of another kind or has no tokeniser.
    """
    network, tokenizer = load_model(path)
    if not hasattr(network, "new_cache"):
        raise ValueError(f"model must be a causal language model, but {path} is a {type(network).__name__}")
    if tokenizer is None:
        raise ValueError(f"model must come with a tokeniser to read texts, but {path} has none")
    return network, tokenizer


def read_model(path: str | Path, unrounded: bool = False) -> Model:
    """Reads a model as `load_model` does, and returns also how the network is built.

    Args:
        path: As in `load_model`.
        unrounded: Keep the real-valued weights of quantisation-aware training, so that a run's checkpoint can be
            loaded into them.
    """
    path = _place(path)
    if path.is_file():
        model = _from_checkpoint(path, unrounded)
    else:
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"model must be a model directory, a run folder or a checkpoint file, but is {path}, which holds no "
                f"config.json"
            )
        model = _from_directory(path)
    if model.tokenizer is not None and hasattr(model.network, "read_padding"):
        model.network.read_padding(padding_id(model.tokenizer))
    model.network.eval()
    return model


def read_image_processor(path: str | Path) -> dict[str, Any] | None:
    """A model's image preprocessing, in the form of `preprocessor_config.json`; `None` if it has none.

    Args:
        path: As in `load_model`.
    """
    path = _place(path)
    if path.is_file():
        states = [state for state in read_checkpoint(path, in_pieces=True).values() if isinstance(state, dict)]
        return next((state["image_processor"] for state in states if "image_processor" in state), None)
    file = path / IMAGE_PROCESSOR
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _place(path: str | Path) -> Path:
    """The model directory or checkpoint file for a path, a run folder or a name on the hub."""
    name, path = str(path), Path(path).expanduser()
    if not path.exists() and ON_THE_HUB.fullmatch(name):
        path = _download(name)
    if not (path / "model").is_dir() and (checkpoint := own_checkpoint(path)).is_file():
        return checkpoint  # the run's network has no class in transformers
    return model_folder(path)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # no connection, no such model, no right to it
        raise FileNotFoundError(
            f"model must be a model directory, a run folder, a checkpoint file or a name on the hub, but {name} is no "
            f"such place here, and from the hub: {first_line(error)}"
        ) from error


def _from_directory(folder: Path) -> Model:
    try:
        config = json.loads((folder / "config.json").read_text(), object_hook=_number)
        kind, arguments = _described(config, folder)
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"config.json must describe a network, but in {folder} it does not: {error!r}") from error
    size = arguments.pop(first_argument(kind))
    records = _read_records(folder)
    if any("form" in record for record in records):
        network = replay(kind(size, **arguments), records)
        read_weights(network, folder)
    elif hasattr(kind, "load_weights") and not shapes_only():
        require_whole_weights(folder)
        with torch.device("meta"):
            network = kind(size, **arguments)
        network.load_weights(folder)
    else:
        network = kind(size, **arguments)
        read_weights(network, folder)
    replay(network, records)
    recipe = {**class_path(kind), "init_args": {n: plain(v) for n, v in arguments.items()}, "size": size}
    return Model(network, _tokenizer_in(folder), recipe, folder)


def _number(value: dict[str, Any]) -> Any:
    """Decodes numbers that JSON lacks, such as infinity, from the form in which transformers writes them."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _tokenizer_in(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokeniser of a model directory, also in the older form of two files if transformers can convert them."""
    if (folder / "tokenizer.json").is_file():
        return open_tokenizer(folder)
    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return None
    try:
        return open_tokenizer(folder)
    except (ValueError, OSError) as error:
        log.info(f"No tokeniser can be made of vocab.json and merges.txt in {folder}: {first_line(error)}")
        return None


def _read_records(folder: Path) -> list[dict[str, Any]]:
    """Reads the records of a network's compression."""
    path = folder / COMPRESSION
    try:
        records = json.loads(path.read_text()) if path.is_file() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{COMPRESSION} must be JSON, but in {folder} it is not: {error}") from error
    if not (isinstance(records, list) and all(isinstance(record, dict) for record in records)):
        raise ValueError(f"{COMPRESSION} must be a list of what was done, but in {folder} it is not")
    return records


def _described(config: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """The network class of this package for a config of transformers, and its arguments.

    It is our own implementation of the architecture or, if there is none or it lacks what the config asks for, a
    wrapper of transformers' network.
    """
    wanted = (config.get("architectures") or [""])[0]
    written: dict[str, Any] = {}
    wrapping: dict[str, Any] = {}
    for module in pkgutil.iter_modules(lit_llm.models.__path__, "lit_llm.models."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type):
                if hasattr(value, "hf_architectures"):
                    written |= dict.fromkeys(value.hf_architectures, value)
                elif issubclass(value, Pretrained) and hasattr(value, "tasks"):
                    wrapping[value.description] = value
    own, wrapper = written.get(wanted), next((kind for kind in wrapping.values() if kind.builds(wanted)), None)
    if own is None and wrapper is None:
        raise ValueError(
            f"architectures in config.json must be one of {', '.join(sorted(written))}, or of transformers "
            f"{' or '.join(sorted(wrapping))}, but is {wanted!r}"
        )
    if own is not None:
        try:
            return own, own.hf_arguments(config)
        except ValueError as refusal:
            if wrapper is None:
                raise
            log.info(f"Opening {folder} with a {wrapper.__name__} instead of a {own.__name__}: {refusal}")
    return wrapper, wrapper.hf_arguments(config)


def finish(network: nn.Module, adaptation: Adaptation | None, unrounded: bool = False) -> None:
    """Turns a network as it was trained into its final form, in place: with plain weights, or quantised.

    Args:
        network: The network as it was trained.
        adaptation: The adaptation it was trained with.
        unrounded: As in `read_model`.
    """
    if adaptation is not None:
        adaptation.finish(network)
    remove_masks(network)
    if not unrounded:
        convert(network)


def read_adapted(path: Path) -> tuple[nn.Module, Adaptation | None]:
    """The network of a checkpoint as it was trained, with the changes of its adaptation and with pruning masks."""
    return _as_trained(path, read_checkpoint(path, in_pieces=True))


def _from_checkpoint(path: Path, unrounded: bool) -> Model:
    checkpoint = read_checkpoint(path, in_pieces=True)
    network, adaptation = _as_trained(path, checkpoint)
    finish(network, adaptation, unrounded)
    return Model(network, _tokenizer_of(checkpoint), checkpoint["network"], None)


def _as_trained(path: Path, checkpoint: dict[str, Any]) -> tuple[nn.Module, Adaptation | None]:
    recipe = checkpoint.get("network")
    if not isinstance(recipe, dict):
        raise ValueError(f"model must be a checkpoint of an objective of this package, but {path} describes no network")
    network = replay(built(recipe, path, recipe["size"]), checkpoint.get("compression", []))
    adaptation = built(checkpoint["adaptation"], path) if checkpoint.get("adaptation") else None
    if adaptation is not None:
        adaptation.prepare(network)
    if not shapes_only():
        prefix = checkpoint.get("evaluated", "network") + "."
        state = checkpoint["state_dict"]
        stored = {k.removeprefix(prefix): whole(v) for k, v in state.items() if k.startswith(prefix)}
        fill(network, stored, path)
    return network, adaptation


def unpacked_tokenizer(path: str | Path) -> str | None:
    """Unpacks a checkpoint's tokeniser into a folder of the cache, and returns that; `None` if it has none."""
    files = _tokenizer_files(read_checkpoint(Path(path), in_pieces=True))
    return str(unpacked(files)) if files else None


def unpacked(files: dict[str, str]) -> Path:
    """Writes a tokeniser's files, given as texts by name, into a folder of the cache, and returns that."""
    folder = cache_folder() / "tokenizers" / cache_name(files=files)
    if read_manifest(folder) is None:
        with new_cache(folder) as (new, _):
            write_tokenizer_files(files, new)
    return folder


def _tokenizer_of(checkpoint: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    files = _tokenizer_files(checkpoint)
    if not files:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer_files(files, Path(folder))
        return open_tokenizer(folder)


def _tokenizer_files(checkpoint: dict[str, Any]) -> dict[str, str]:
    states = (state.get("tokenizer") for state in checkpoint.values() if isinstance(state, dict))
    return next((files for files in states if files), {})
