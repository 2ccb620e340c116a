"""Weights of a network: in files, by transformers' names and in its shapes, out and in; and from network to network."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_llm.compression.compression import is_reformed
from lit_llm.shapes import shapes_only


def write_weights(network: nn.Module, folder: Path) -> None:
    """Writes a network's weights as transformers keeps them, real numbers in 32 bits."""
    if hasattr(network, "save_weights") and not is_reformed(network):
        network.save_weights(folder)
        return
    # A tied matrix is one tensor under its first name.
    named = {name: _plain_tensor(tensor) for name, tensor in _as_transformers(network).items()}
    named |= {name: torch.zeros(shape) for name, shape in _zeros(network).items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def _plain_tensor(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().float() if tensor.is_floating_point() else tensor
    return tensor.contiguous().cpu()


def read_weights(network: nn.Module, folder: Path) -> None:
    """Copies the weights of a directory of transformers, or one in its form, into a network that has any.

    Raises:
        FileNotFoundError: When there are none, or one of several files is missing.
        ValueError: When a file is cut off, or a parameter is missing, left over, of another shape, or tied here and two
            different ones there.
    """
    if shapes_only():
        return
    stored = {name: t for name, t in _tensors(folder) if not name.endswith(getattr(network, "hf_buffers", ()))}
    name_of = hf_names(network)
    base = name_of("")
    if not any(name.startswith(base) for name in stored):  # saved without its head
        stored = {name if name.startswith("lm_head.") else base + name: t for name, t in stored.items()}
    for name in _zeros(network):
        if name in stored and stored.pop(name).any():
            raise ValueError(
                f"{name} must be zero for a network without biases, but is not in {folder}; give the network biases"
            )
    _copy_as_transformers(network, stored, folder)


def copy_weights(
    source: nn.Module,
    target: nn.Module,
    where: Path | str,
    sizes: tuple[int, int] | None = None,
    head: Collection[str] = (),
) -> list[str]:
    """Copies all parameters of one network into another of the same form, or into transformers' own of that form.

    Args:
        source: From which.
        target: Into which.
        where: What errors call the source.
        sizes: How many classes the two have, where those are not the same: heads of so many rows are passed over.
        head: What is passed over besides, by name.

    Returns:
        The names of the parameters that were passed over.

    Raises:
        ValueError: When a parameter is missing, left over, of another shape, or tied here and two different ones there,
            or the source is transformers' own network, with what the target, which is written here, lacks.
    """
    _require_form(source, target, where)
    if hasattr(target, "load_weights") and hasattr(source, "hf_name"):  # a network written here, into transformers'
        stored = _as_transformers(source) | {name: torch.zeros(shape) for name, shape in _zeros(source).items()}
        _copy_as_transformers(target, stored, Path(where))
        return []
    own, stored = _own(target), _own(source)

    def is_head(name: str) -> bool:
        here, there = own[name].shape, stored[name].shape
        return here != there and (there[:1], here[:1]) == ((sizes[0],), (sizes[1],)) and here[1:] == there[1:]

    new = sorted(name for name in own.keys() & stored.keys() if name in head or (sizes is not None and is_head(name)))
    of_both = ({name: tensor for name, tensor in each.items() if name not in new} for each in (own, stored))
    _copy(*of_both, Path(where), _tied(target))
    return new


def _require_form(source: nn.Module, target: nn.Module, where: Path | str) -> None:
    """Refuses transformers' own network where one of that architecture written here lacks what it has."""
    config = source.to_hf_config() if hasattr(source, "load_weights") else {"architectures": [None]}
    if config["architectures"][0] in getattr(target, "hf_architectures", ()):
        try:
            target.hf_arguments(config)
        except ValueError as refusal:
            raise ValueError(
                f"model.network must be one that the weights of {where} fit, but is a {type(target).__name__}: "
                f"{refusal}; leave it out to take theirs"
            ) from refusal


def fill(network: nn.Module, stored: dict[str, Tensor], where: Path | str) -> None:
    """Copies weights into a network by the names that it has for them.

    Raises:
        ValueError: When a parameter is missing, left over, of another shape, or tied here and two different ones
            there; `where` names the source.
    """
    _copy(_own(network), stored, Path(where), _tied(network))


def _own(network: nn.Module) -> dict[str, Tensor]:
    """What a network has to be given: its parameters, a tied one once, and what else is in its state."""
    once, all_names = (dict(network.named_parameters(remove_duplicate=remove)) for remove in (True, False))
    others = {name: tensor for name, tensor in network.state_dict().items() if name not in all_names}
    return once | others


def _tied(network: nn.Module) -> dict[str, str]:
    """The further names of tied parameters, and the first name of each."""
    first: dict[nn.Parameter, str] = {}
    names = ((name, first.setdefault(p, name)) for name, p in network.named_parameters(remove_duplicate=False))
    return {name: of_first for name, of_first in names if name != of_first}


def _copy(own: dict[str, Tensor], stored: dict[str, Tensor], source: Path, tied: dict[str, str]) -> None:
    """Copies weights by name; every one must be there, fit, and be used.

    Args:
        own: The network's.
        stored: What is copied into them.
        source: Where that is from.
        tied: Names under which a matrix may be there once more, and its own.
    """
    missing, extra = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys() - tied.keys())
    for what, names in (("lacks", missing), ("also has", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"model must hold the network's tensors and no others, but {source} {what} {names[0]}{more}"
            )
    for name, first in tied.items():
        if name in stored and not torch.equal(stored[name], stored[first]):
            raise ValueError(
                f"{name} must be the same as {first}, to which the network ties it, but is another matrix in {source}; "
                f"set tie_word_embeddings in its config.json, or the network's tie_embeddings, to false"
            )
    with torch.no_grad():
        for name, p in own.items():
            if p.shape != stored[name].shape:
                raise ValueError(
                    f"{name} must have the shape {tuple(p.shape)} of the network, but has {tuple(stored[name].shape)} "
                    f"in {source}"
                )
            p.copy_(stored[name])


def _copy_as_transformers(network: nn.Module, stored: dict[str, Tensor], source: Path) -> None:
    """As `_copy`, by the names, and in the shapes, that transformers gives what is in the network."""
    name_of = hf_names(network)
    tied = {name_of(name): name_of(first) for name, first in _tied(network).items()}
    _copy(_as_transformers(network), stored, source, tied)


def _as_transformers(network: nn.Module) -> dict[str, Tensor]:
    """What a network has to be given, by the names, and in the shapes, that transformers gives it."""
    view, name_of = getattr(network, "hf_view", lambda name, parameter: parameter), hf_names(network)
    return {name_of(name): view(name, tensor) for name, tensor in _own(network).items()}


def hf_names(network: nn.Module) -> Callable[[str], str]:
    """How transformers calls what is in a network; one of its own is one level further in here."""
    return getattr(network, "hf_name", lambda name: name.removeprefix("model."))


def _zeros(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """What transformers' network has and this one does without."""
    return dict(network.hf_zeros()) if hasattr(network, "hf_zeros") else {}


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in _weight_files(folder):
        with _whole(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no dict)
                yield name, tensors.get_tensor(name)


def require_whole_weights(folder: Path) -> None:
    """Refuses files of weights that are not whole.

    Raises:
        FileNotFoundError: When there are none, or one of several is missing.
        ValueError: When one is cut off.
    """
    for file in _weight_files(folder):
        with _whole(file):
            pass


@contextmanager
def _whole(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"model must hold whole weights, but {file} does not: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights, in transformers' order of preference; a folder may hold copies in another form."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        files = sorted({folder / Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
        if absent := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"model must hold all files that {index} names, but lacks {', '.join(absent)}")
        return files
    remedy = "; pickles are not read, save them as safetensors" if any(folder.glob("*.bin")) else ""
    raise FileNotFoundError(f"model must hold weights as .safetensors, but {folder} has none{remedy}")
