"""Checkpoint files that are never half-written, and are read without executing anything in them."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

from lit_llm.files import replacing
from lit_llm.shards import Pieces, is_shared_out, share_to_keep, whole
from lit_llm.wording import first_line, needing

SEAL = b"lit-llm sha256:"
"""Marks the trailer of our checkpoint files: this, then a SHA-256 of all bytes before it. torch ignores the trailer."""


def own_checkpoint(run: Path) -> Path:
    """The checkpoint that represents a run: its best, or its last if there is no best."""
    best, last = (run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    return last if last.exists() and not best.exists() else best


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Raises a plain `OSError` for a failed write, where the writers in C++ and Rust obscure that the disk is full."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(
            f"disk must have room to write {path}, but writing failed: {first_line(error)}; the last checkpoint is "
            f"whole"
        ) from error


class Shares(NamedTuple):
    """The shards that one of several processes writes of a checkpoint.

    Attributes:
        tensors: Offsets at which a shard begins in its tensor, and the shard, by the tensor's key path in the
            checkpoint.
        name: Name of the folder of this save, with one file per process; the same in all processes.
        group: Process group used for nothing else: the processes wait for one another, maybe while training continues.
    """

    tensors: dict[str, tuple[list[int], Tensor]]
    name: str
    group: Any

    def write(self, path: Path) -> None:
        """Writes the shards beside a checkpoint, and waits until all processes have written theirs.

        Raises:
            OSError: When a process could not write.
        """
        shares = {name: [start, _alone(share)] for name, (start, share) in self.tensors.items()}
        folder = path.with_suffix(FOLDER) / self.name
        file = folder / _file_name(dist.get_rank(self.group), dist.get_world_size(self.group))
        write_together(lambda: write_sealed(shares, file), folder, self.group)


def write_together(write: Callable[[], None], folder: Path, group: Any) -> None:
    """Writes this process's part of a folder, and waits until all processes of a group have written theirs.

    Raises:
        OSError: In all processes, when one of them could not write; the folder is removed then.
    """
    failed = None
    try:
        write()
    except Exception as error:
        failed = error
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, failed and repr(failed), group=group)
    if dist.get_rank(group) == 0 and any(said):
        shutil.rmtree(folder, ignore_errors=True)
    if failed is not None:
        raise failed
    for other, line in enumerate(said):
        if line:
            raise OSError(f"checkpoint must be written by all processes, but process {other} could not: {line}")


FOLDER = ".shares"
"""Suffix, instead of `.ckpt`, of the folder with a checkpoint's shards; each save has its own folder in it."""


def _file_name(rank: int, count: int) -> str:
    return f"{rank:05}-of-{count:05}.pt"


def _alone(share: Tensor) -> Tensor:
    """A shard in CPU memory with a storage of its own: `torch.save` would write the whole storage of a view."""
    share = share.cpu()
    return share if share.untyped_storage().nbytes() == share.nbytes else share.clone()


def cut(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[list[int], Tensor]]]:
    """Splits a checkpoint into one with a meta tensor for each sharded tensor, and this device's shards of those."""
    shares = {}

    def emptied(path: Any, value: Any) -> Any:
        if not (isinstance(value, Tensor) and is_shared_out([value])):
            return value
        if (share := share_to_keep(value)) is not None:
            shares[keystr(path)] = share
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return tree_map_with_path(emptied, checkpoint), shares


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it; reads one without executing anything in it.

    If several processes write a checkpoint, `NAME.ckpt` holds what they have in common and names the folder in
    `NAME.shares/` that holds their shards. It is replaced once all shards are written, in one atomic step, which is not
    possible for a folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves, so that at every moment `path` is either the old checkpoint or the new one.

        Args:
            checkpoint: The whole checkpoint; if several processes write, all but the shards, as the first process has
                it.
            path: The checkpoint file.
            storage_options: If several processes write, the shards of this one: `Shares`, or an object with the same
                `name`, `group` and `write`.
        """
        path, shares = Path(path), storage_options
        if shares is not None:
            shares.write(path)
            if dist.get_rank(shares.group) > 0:
                return
            checkpoint = {**checkpoint, "shares": [shares.name, dist.get_world_size(shares.group)]}
        write_sealed(checkpoint, path)
        _discard_shares(path, but=shares and shares.name)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Loads plain values and tensors only."""
        return read_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint with its shards."""
        super().remove_checkpoint(path)
        _discard_shares(Path(path))


def write_sealed(values: dict[str, Any], path: Path) -> None:
    """Writes plain values and tensors, followed by a hash of the file."""
    with replacing(path) as new:
        with plain_errors(path):
            torch.save(values, new)
        seal(new)


def seal(path: Path) -> None:
    """Appends to a file a hash of its content."""
    digest = _digest(path)
    with path.open("ab") as file:
        file.write(SEAL + digest)


def _discard_shares(path: Path, but: str | None = None) -> None:
    """Removes the shards of a checkpoint's earlier or interrupted saves, or of all saves if `but` is `None`."""
    folder = path.with_suffix(FOLDER)
    for save in folder.iterdir() if folder.is_dir() else ():
        if save.name != but:
            shutil.rmtree(save, ignore_errors=True)
    if but is None:
        shutil.rmtree(folder, ignore_errors=True)


def read_checkpoint(path: Path, map_location: Any = "cpu", in_pieces: bool = False) -> dict[str, Any]:
    """Reads a checkpoint file after checking that it is whole.

    Args:
        path: The checkpoint file.
        map_location: As in `torch.load`; shards that several processes wrote are always loaded to the CPU.
        in_pieces: Return tensors that several processes wrote as `shards.Pieces`, which read only the parts asked for.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is truncated or damaged, lacks a shard, holds more than plain values and tensors, or is not
            a checkpoint.
    """
    if not path.is_file():
        lacks = "is a folder; name a file in it, last or best" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"ckpt_path must be a checkpoint file, but is {path}, which {lacks}")
    others = [p.name for p in sorted(path.parent.glob("*.ckpt")) if p.name != path.name]
    remedy = f"; {path.parent} also holds {', '.join(others)}" if others else ""
    require_whole(path, remedy)
    checkpoint = _load(path, remedy, map_location=map_location)
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict)):
        found = "a dict without one" if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise ValueError(f"ckpt_path must hold a checkpoint, with its state_dict, but {path} holds {found}{remedy}")
    if "shares" not in checkpoint:
        return checkpoint
    checkpoint = _with_pieces(path, checkpoint, remedy)
    return checkpoint if in_pieces else tree_map(lambda v: whole(v) if isinstance(v, Pieces) else v, checkpoint)


def _with_pieces(path: Path, checkpoint: dict[str, Any], remedy: str) -> dict[str, Any]:
    """Replaces a checkpoint's meta tensors by `Pieces` of the memory-mapped shard files.

    DeepSpeed's files are not mapped: the first read of a piece converts all of them, into memory.
    """
    name, count = _named_shares(path, checkpoint.pop("shares"))
    folder, stage = path.with_suffix(FOLDER) / Path(name).name, checkpoint.get("zero")
    files = (
        [folder / _file_name(rank, count) for rank in range(count)]
        if stage is None
        else zero_files(folder, stage, count)
    )
    if lacking := [file for file in files if not file.is_file()]:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ValueError(f"ckpt_path must be a whole checkpoint, but {path} lacks its share {lacking[0]}{more}{remedy}")
    if stage is not None:
        state = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in checkpoint["state_dict"].items()}
        fill = functools.cache(functools.partial(_fill_from_zero, state, folder, files, remedy))
        converted = {n: Pieces(n, t.shape, t.dtype, [([0] * t.ndim, t, fill)]) for n, t in state.items()}
        zero = {"stage": stage, "devices": count, "folder": str(folder)}
        return {**checkpoint, "state_dict": converted, "zero": zero}
    check_once, found = functools.cache(require_whole), {}
    for file in files:
        check = functools.partial(check_once, file, remedy)  # a file is checked only before data of it is read
        for key, (start, share) in _load(file, remedy, map_location="cpu", mmap=True).items():
            found.setdefault(key, []).append((start, share, check))

    def pieces(where: Any, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_meta):
            return value
        return Pieces(keystr(where), value.shape, value.dtype, found.get(keystr(where), []))

    return tree_map_with_path(pieces, checkpoint)


def _named_shares(path: Path, shares: Any) -> tuple[str, int]:
    """Name of the folder with a checkpoint's shards, and number of processes that wrote them."""
    match shares:
        case [str(name), int(count)] if 0 < count < 10**5:  # file names have five digits for it
            return name, count
    raise ValueError(
        f"shares must be a folder's name and a number of processes, but in {path} they are {str(shares)[:100]}"
    )


def zero_files(folder: Path, stage: int, count: int) -> list[Path]:
    """The files that DeepSpeed writes for a float32 network on `count` processes.

    Each process writes its optimiser state. In stage 3 each also writes its part of the model, otherwise only the first
    one writes the model.
    """
    ranks = [f"zero_pp_rank_{rank}_" for rank in range(count)]
    names = [f"{rank}mp_rank_00_optim_states.pt" for rank in ranks]
    names += [f"{rank}mp_rank_00_model_states.pt" for rank in (ranks if stage == 3 else [""])]
    return [folder / name for name in names]


def _fill_from_zero(state: dict[str, Tensor], folder: Path, files: list[Path], remedy: str) -> None:
    """Fills the tensors of `state` with the weights of a DeepSpeed checkpoint, by DeepSpeed's own conversion."""
    for file in files:
        require_whole(file, remedy)
    with needing("deepspeed", "deepspeed", f"to read {folder}"):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as convert
    with without_pickles(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        found = convert(str(folder.parent), tag=folder.name)
    for name, tensor in state.items():
        tensor.copy_(found[name])


@contextmanager
def without_pickles() -> Iterator[None]:
    """Limits DeepSpeed's `torch.load` to tensors and its own plain classes: other pickles could execute any code."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def require_whole(path: Path, remedy: str = "") -> None:
    """Refuses a file that is cut short or damaged.

    Raises:
        ValueError: With what is wrong, followed by `remedy`.
    """
    if damage := _damage(path):
        raise ValueError(f"ckpt_path must be a whole checkpoint, but {path} {damage}{remedy}")


def _load(path: Path, remedy: str, **options: Any) -> Any:
    """Reads a file of plain values and tensors."""
    try:
        with unset_fake_temporarily():  # a file's tensors are real also under `FakeTensorMode`
            return torch.load(path, weights_only=True, **options)
    except Exception as error:
        require_whole(path, remedy)
        raise ValueError(
            f"ckpt_path must hold plain values and tensors only, but {path} does not: {first_line(error)}{remedy}"
        ) from error


def _digest(path: Path, without: int = 0) -> bytes:
    """SHA-256 of a file except its last `without` bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size - without
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.digest()


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; `None` if it is whole."""
    length = len(SEAL) + hashlib.sha256().digest_size
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - length))
        end = file.read()
    if end.startswith(SEAL):
        return None if end == SEAL + _digest(path, without=length) else "is damaged"
    try:  # not written here: a zip archive has its own checksums
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # damage shows in many ways
        return f"is not: {error}"
    if part:
        return f"is damaged in {part}"
    return None if end[-22:].startswith(b"PK\x05\x06") else "is cut short"  # the archive's end record
