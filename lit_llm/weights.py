"""Writes and reads weights in transformers' names and shapes, and copies them between networks."""

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
    """Writes a network's weights in transformers' form; floating-point ones as float32."""
    if hasattr(network, "save_weights") and not is_reformed(network):
        network.save_weights(folder)
        return
    # A tied matrix is one tensor under its first name.
    tensors = {name: tensor.detach() for name, tensor in _as_transformers(network).items()}
    named = {name: (t.float() if t.is_floating_point() else t).contiguous().cpu() for name, t in tensors.items()}
    named |= {name: torch.zeros(shape) for name, shape in _zeros(network).items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def read_weights(network: nn.Module, folder: Path) -> None:
    """Copies the weights of a directory in transformers' form into a network; under `FakeTensorMode` does nothing.

    Raises:
        FileNotFoundError: When there are no weights, or one of several files is missing.
        ValueError: When a file is truncated, or a parameter is missing, left over, of another shape, or tied in the
            network but stored with two different values.
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
    """Copies all parameters of one network into another of the same architecture, also into transformers' own.

    Args:
        source: Network to copy from.
        target: Network to copy into.
        where: Name of the source in error messages.
        sizes: Numbers of classes of source and target if they differ: heads with these numbers of rows are skipped.
        head: Names of further parameters to skip.

    Returns:
        The names of the skipped parameters.

    Raises:
        ValueError: When a parameter is missing, left over, of another shape, or tied in the target but with two
            different values in the source, or the source is transformers' own network with a feature that our
            implementation as target lacks.
    """
    _require_form(source, target, where)
    if hasattr(target, "load_weights") and hasattr(source, "hf_name"):  # from our implementation into transformers' own
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
    """Refuses transformers' own network as source if our implementation as target lacks a feature of it."""
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
    """Copies weights into a network by its own names for them.

    Raises:
        ValueError: When a parameter is missing, left over, of another shape, or tied in the network but stored with two
            different values; `where` names the source.
    """
    _copy(_own(network), stored, Path(where), _tied(network))


def _own(network: nn.Module) -> dict[str, Tensor]:
    """All tensors of a network's state; a tied parameter only under its first name."""
    once, all_names = (dict(network.named_parameters(remove_duplicate=remove)) for remove in (True, False))
    others = {name: tensor for name, tensor in network.state_dict().items() if name not in all_names}
    return once | others


def _tied(network: nn.Module) -> dict[str, str]:
    """The first name of each tied parameter, by its further names."""
    first: dict[nn.Parameter, str] = {}
    names = ((name, first.setdefault(p, name)) for name, p in network.named_parameters(remove_duplicate=False))
    return {name: of_first for name, of_first in names if name != of_first}


def _copy(own: dict[str, Tensor], stored: dict[str, Tensor], source: Path, tied: dict[str, str]) -> None:
    """Copies weights by name; names and shapes must match exactly.

    Args:
        own: The network's tensors.
        stored: The tensors to copy into them.
        source: Name of their source in error messages.
        tied: First names of tied matrices, by further names under which they may be stored again.
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
    """Copies weights as `_copy` does, in transformers' names and shapes."""
    name_of = hf_names(network)
    tied = {name_of(name): name_of(first) for name, first in _tied(network).items()}
    _copy(_as_transformers(network), stored, source, tied)


def _as_transformers(network: nn.Module) -> dict[str, Tensor]:
    """All tensors of a network's state in transformers' names and shapes."""
    view, name_of = getattr(network, "hf_view", lambda name, parameter: parameter), hf_names(network)
    return {name_of(name): view(name, tensor) for name, tensor in _own(network).items()}


def hf_names(network: nn.Module) -> Callable[[str], str]:
    """The function from a network's names to transformers'; transformers' own networks are wrapped in `model` here."""
    return getattr(network, "hf_name", lambda name: name.removeprefix("model."))


def _zeros(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors that transformers' network has and this one lacks, which must be zero."""
    return dict(network.hf_zeros()) if hasattr(network, "hf_zeros") else {}


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in _weight_files(folder):
        with _whole(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no dict)
                yield name, tensors.get_tensor(name)


def require_whole_weights(folder: Path) -> None:
    """Checks that all files of weights are present and complete."""
    for file in _weight_files(folder):
        with _whole(file):
            pass


def bytes_on_disk(folder: Path) -> int:
    """Bytes of the weights in a model directory, without copies in another form."""
    return sum(file.stat().st_size for file in _weight_files(folder))


@contextmanager
def _whole(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"model must hold whole weights, but {file} does not: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights: one whole file if there is one, as transformers prefers, otherwise those of the index."""
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
