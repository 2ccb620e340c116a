"""The teacher of a distillation, and a cache of its predictions on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedTokenizerBase

from lit_llm.batch import inputs
from lit_llm.checkpoints import read_image_processor, read_model
from lit_llm.data.cache import cache_folder, cache_name
from lit_llm.data.image_processor import ImageProcessor
from lit_llm.data.tokenizer import fingerprint
from lit_llm.objectives.divergences import SoftTargets
from lit_llm.recipes import first_argument

log = logging.getLogger(__name__)


class Teacher:
    """A frozen network in evaluation mode, which is no submodule of the objective that holds it.

    Its weights and floating-point inputs, such as images, are in 32 bits, whatever the student's precision is. Images
    are normalised for it as in its own training, if its model directory says how.

    Args:
        path: A model directory, a run folder, a checkpoint file or a name on the hub.
        precision: Precision of its computation: `32-true` or `bf16-mixed`.
    """

    def __init__(self, path: str, precision: str) -> None:
        self.path, self.precision = path, precision
        with _in_32_bits():
            model = read_model(path)
        self.network, self.tokenizer, self.size = model.network, model.tokenizer, model.recipe["size"]
        self.network.requires_grad_(False)
        self.network.register_forward_pre_hook(self._adjust, with_kwargs=True)
        self._scale_and_shift: tuple[torch.Tensor, torch.Tensor] | None = None  # from the student's normalisation

    def require(self, student: nn.Module, size_name: str, size: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Checks that the student has the same task, tokeniser and classes."""
        sized_by = first_argument(type(self.network))
        if sized_by != size_name:
            kind = type(self.network).__name__
            raise ValueError(
                f"model.teacher must be sized by {size_name}, but {self.path} is a {kind}, sized by {sized_by}"
            )
        both = tokenizer is not None and self.tokenizer is not None
        if both and fingerprint(tokenizer) != fingerprint(self.tokenizer):
            raise ValueError(
                f"data.tokenizer must be the one that model.teacher was trained with, but is another than that of "
                f"{self.path}; set data.tokenizer to {self.path}"
            )
        if self.size != size:
            raise ValueError(
                f"model.teacher must have the student's {size_name}, {size}, but {self.path} has {self.size}"
            )
        mine, theirs = (getattr(network, "class_names", None) for network in (student, self.network))
        if mine and theirs and mine != theirs and not any(names[0].startswith("LABEL_") for names in (mine, theirs)):
            raise ValueError(
                f"model.teacher must tell apart the student's classes, {', '.join(mine)}, but {self.path} tells apart "
                f"{', '.join(theirs)}"
            )

    def read_images_of(self, student: dict[str, Any]) -> None:
        """Prepares to convert images that are normalised for the student.

        Args:
            student: The student's `preprocessor_config.json`.

        Raises:
            ValueError: When the channels differ.
        """
        own = read_image_processor(self.path)
        if own is None:
            return
        here, there = ImageProcessor.from_hf(student), ImageProcessor.from_hf(own)
        if len(here.mean) != len(there.mean):
            raise ValueError(
                f"data.channels must be those of the images that model.teacher reads, {len(there.mean)}, but are "
                f"{len(here.mean)}; set data.channels to {len(there.mean)}"
            )
        if (here.mean, here.std) != (there.mean, there.std):
            values = (torch.tensor(each)[:, None, None] for each in (here.mean, here.std, there.mean, there.std))
            mean, std, own_mean, own_std = values
            self._scale_and_shift = std / own_std, (mean - own_mean) / own_std

    def _adjust(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(_widened, (args, kwargs))
        if self._scale_and_shift is not None and "pixel_values" in kwargs:
            scale, shift = (each.to(kwargs["pixel_values"].device) for each in self._scale_and_shift)
            kwargs["pixel_values"] = kwargs["pixel_values"] * scale + shift
        return args, kwargs

    @contextmanager
    def asked(self) -> Iterator[nn.Module]:
        """A context that gives the network, without gradients and in its precision."""
        device = next(self.network.parameters()).device.type
        low = torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16-mixed")
        with torch.no_grad(), _in_32_bits(), low:
            yield self.network

    def fingerprint(self) -> str:
        """A hash of all its weights, and of how images are normalised for it."""
        digest = hashlib.blake2b(digest_size=12)
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for tensor in self._scale_and_shift or ():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


@contextmanager
def _in_32_bits() -> Iterator[None]:
    """Sets torch's default dtype to fp32, because a trainer may have set it to its own precision."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


class TeacherCache:
    """A cache on disk of a teacher's `k` most likely classes of each row, or tokens of each position.

    Rows are found by a hash of the network's inputs, so changed data are never mistaken for old ones. They are appended
    as they are first read, to one memory-mapped file per length of rows, with 6 bytes per class or token. From the
    first epoch on, training uses the predictions as stored (log-probabilities in fp16). Meant for one run at a time.

    Args:
        teacher: The teacher; each has its own cache.
        temperature: Divisor of its logits.
        k: Number of classes or tokens to keep.
        rank: Rank of this process, which has its own files.
    """

    def __init__(self, teacher: Teacher, temperature: float, k: int, rank: int = 0) -> None:
        self.k = k
        name = cache_name(
            teacher=teacher.fingerprint(), temperature=temperature, precision=teacher.precision, k=k, version=1
        )
        self.folder, self.rank = cache_folder() / "teachers" / name, rank
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._records: dict[Path, np.ndarray] = {}
        for path in sorted(self.folder.glob(f"*-{rank}.bin")):
            self._open(path)

    def read(self, batch: Mapping[str, Any]) -> SoftTargets | None:
        """The cached predictions for a batch; `None` if a row is missing."""
        keys = row_keys(batch)
        if not all(key in self._places for key in keys):
            return None
        [path] = {self._places[key][0] for key in keys}  # rows of one batch have equal lengths
        found = self._records[path][[self._places[key][1] for key in keys]]
        log_p, index = (torch.from_numpy(np.ascontiguousarray(found[name])) for name in ("log_p", "index"))
        return SoftTargets(log_p.float(), index.long())

    def add(self, batch: Mapping[str, Any], taught: SoftTargets) -> SoftTargets:
        """Adds the predictions for a batch, except for rows that are cached already, and returns them as stored."""
        keys = row_keys(batch)
        kept = taught.top(self.k)
        path = self.folder / f"{'x'.join(map(str, kept.log_p.shape[1:]))}-{self.rank}.bin"
        if path not in self._records:
            self._open(path)
        new = [row for row, key in enumerate(keys) if key not in self._places and keys.index(key) == row]
        records = np.zeros(len(new), dtype=self._records[path].dtype)
        records["key"] = [np.frombuffer(keys[row], dtype=np.uint8) for row in new]
        records["log_p"], records["index"] = (x[new].cpu().numpy() for x in (kept.log_p.float(), kept.index))
        with path.open("ab") as file:
            file.write(records.tobytes())
        self._map(path)
        return self.read(batch)

    def _open(self, path: Path) -> None:
        """Opens a file of an earlier run or a new one; its name begins with the shape of a row's predictions."""
        shape = tuple(map(int, path.stem.split("-")[0].split("x")))
        dtype = np.dtype([("key", "u1", 16), ("log_p", "<f2", shape), ("index", "<i4", shape)])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(file.tell() // dtype.itemsize * dtype.itemsize)  # a killed process may leave half a record
        self._records[path] = np.zeros(0, dtype)
        self._map(path)
        if count := len(self._records[path]):
            log.info(f"Using the teacher's cached answers for {count:,} rows: {path}")

    def _map(self, path: Path) -> None:
        """Maps a file again after records were appended, and indexes the new ones."""
        dtype, before = self._records[path].dtype, len(self._records[path])
        count = path.stat().st_size // dtype.itemsize
        if count:
            self._records[path] = np.memmap(path, dtype=dtype, mode="r", shape=(count,))
        for place in range(before, count):
            self._places[self._records[path][place]["key"].tobytes()] = path, place


def row_keys(batch: Mapping[str, Any]) -> list[bytes]:
    """A hash of the network's inputs for each row, without padding."""
    read = {name: tensor.cpu() for name, tensor in sorted(inputs(batch).items()) if name != "num_bytes"}
    mask = read.get("attention_mask")
    keys = []
    for row in range(len(next(iter(read.values())))):
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in read.items():
            part = tensor[row]
            if mask is not None and tensor.shape == mask.shape:
                part = part[mask[row].bool()]
            digest.update(f"{name}{tuple(part.shape)}".encode())
            digest.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        keys.append(digest.digest())
    return keys
