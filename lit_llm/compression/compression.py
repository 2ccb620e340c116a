"""The one face of all methods, and what a network remembers of what was done to it."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any, ClassVar

from torch import nn

Batch = Mapping[str, Any]
"""What a data module yields: tensors by name. The network is called with those that it reads (see `calibration`)."""

Record = dict[str, Any]
"""What one method did, as plain values: its `class_path` and `init_args`, what it found and left, and as `form`, only
where the network is no longer made as its config says, all that is needed to make it so."""


class Compression(ABC):
    """A way to make a network smaller or faster; a subclass is a frozen dataclass of its arguments.

    The face is two calls. `apply` works on a network in place, once, and returns its record, which it also appends to
    `network.compression`: so that `checkpoints` can write it beside the weights (`compression.json`) and an objective
    into its checkpoints. `reform` gives a network that was only just made, and has no weights worth keeping, the form
    that the record tells of; then the weights are loaded. A method that leaves the network as its config describes it
    (weights set to zero, uniformly fewer neurons) has no `form` in its record, and no `reform`.

    A subclass writes `compress`, and `reform` where it changes the form. Methods compose: one network may be compressed
    by several, or by one several times.
    """

    needs_batches: ClassVar[bool] = False
    """Whether it looks at what flows through the network, and so wants calibration batches."""

    def apply(self, network: nn.Module, batches: Iterable[Batch] = ()) -> Record:
        """Compresses a network in place.

        Args:
            network: Any network; it keeps its mode (training or evaluation) and device.
            batches: Calibration batches as a data module yields them, on the network's device; read several times.

        Returns:
            The record.

        Raises:
            ValueError: When a pattern matches no layer, batches are wanted but there are none, or the method has no
                meaning for such a network.
        """
        batches = list(batches)
        if self.needs_batches and not batches:
            raise ValueError(f"calibration of {type(self).__name__} must have at least one batch, but is empty")
        record = self.described() | self.compress(network, batches)
        network.compression = [*records_of(network), record]
        return record

    def chosen(self, network: nn.Module) -> dict[str, nn.Module]:
        """The layers that it acts on, by name, where it chooses some: so that a mistake shows beforehand.

        Raises:
            ValueError: When there are none, or they do not suit the method.
        """
        return {}

    @abstractmethod
    def compress(self, network: nn.Module, batches: list[Batch]) -> Record:
        """Does the work of `apply`, in place; what it returns goes into the record (and must be plain values)."""

    @classmethod
    def reform(cls, network: nn.Module, form: Any) -> None:
        """Gives a fresh network the form that `compress` left it; to do it again changes nothing.

        Raises:
            NotImplementedError: For a method that leaves the form as it was.
        """
        raise NotImplementedError(f"form must be of a method that changes one, but {cls.__name__} does not")

    def described(self) -> Record:
        """The method itself as plain values."""
        kind = type(self)
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def records_of(network: nn.Module) -> list[Record]:
    """What has been done to a network, first to last."""
    return list(getattr(network, "compression", []))


def is_reformed(network: nn.Module) -> bool:
    """Whether a network is no longer made as its config says."""
    return any("form" in record for record in records_of(network))


def replay(network: nn.Module, records: Iterable[Record]) -> nn.Module:
    """Gives a network the form that records tell of, before weights of that form are loaded; and the records.

    What the network remembers already, first to last, is not done again: layers that it was done to may have gone
    since, or have become smaller still.

    Raises:
        ValueError: When a record names no method of compression, or does not fit the network.
    """
    records = list(records)
    done = takewhile(lambda pair: pair[0] == pair[1], zip(records, records_of(network)))
    for record in records[len(list(done)) :]:
        kind = method_of(record)
        if "form" in record:
            try:
                kind.reform(network, record["form"])
            except (AttributeError, IndexError, KeyError, TypeError, NotImplementedError) as error:
                raise ValueError(
                    f"compression must be of this network, but its {record['class_path']} does not fit: {error}"
                ) from error
    if records or records_of(network):
        network.compression = records
    return network


def method_of(record: Any) -> type[Compression]:
    """The class that a record names; nothing else is ever imported by name.

    Raises:
        ValueError: When there is no such class, or it is no method of compression.
    """
    path = record.get("class_path") if isinstance(record, dict) else None
    module, _, name = str(path).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"compression must name methods that can be imported, but names {path}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Compression)):
        raise ValueError(f"compression must name methods of compression, but names {path}")
    return kind


def require_fraction(name: str, value: float) -> None:
    """Refuses what is no part of a whole that leaves something.

    Raises:
        ValueError: When `value` is not in [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), but is {value}")
