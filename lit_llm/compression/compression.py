"""The common interface of compression methods, and the records of what was done to a network."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any, ClassVar

from torch import nn

Batch = Mapping[str, Any]
"""A batch of a data module: tensors by name. The network is called with those it accepts (see `calibration`)."""

Record = dict[str, Any]
"""What one method did, as plain values: its `class_path` and `init_args`, its results, and, only if the network's
structure no longer follows from its config, `form`: all that is needed to recreate the structure."""


class Compression(ABC):
    """A method that makes a network smaller or faster; a subclass is a frozen dataclass of its arguments.

    The interface is two calls. `apply` compresses a network in place, once, and returns a record, which it also appends
    to `network.compression`; `checkpoints` saves it next to the weights (`compression.json`), and objectives in their
    checkpoints. `reform` gives a newly built network the structure in the record, before the weights are loaded. A
    method after which the config still describes the network (weights set to zero, uniformly fewer neurons) has no
    `form` in its record and no `reform`.

    A subclass implements `compress`, and `reform` if it changes the structure. Methods compose: a network may be
    compressed by several methods, or several times by one.
    """

    needs_batches: ClassVar[bool] = False
    """Whether the method looks at activations or gradients, and so needs calibration batches."""

    def apply(self, network: nn.Module, batches: Iterable[Batch] = ()) -> Record:
        """Compresses a network in place.

        Args:
            network: Any network; it keeps its mode (training or evaluation) and device.
            batches: Calibration batches as a data module yields them, on the network's device.

        Returns:
            The record.

        Raises:
            ValueError: When a pattern matches no layer, batches are needed but there are none, or the method does not
                apply to such a network.
        """
        batches = list(batches)
        if self.needs_batches and not batches:
            raise ValueError(f"calibration of {type(self).__name__} must have at least one batch, but is empty")
        record = self.described() | self.compress(network, batches)
        network.compression = [*records_of(network), record]
        return record

    def chosen(self, network: nn.Module) -> dict[str, nn.Module]:
        """The layers that the method acts on, by name, after checking them; empty if it does not choose layers.

        Raises:
            ValueError: When there are none, or they do not suit the method.
        """
        return {}

    @abstractmethod
    def compress(self, network: nn.Module, batches: list[Batch]) -> Record:
        """Compresses in place, for `apply`; returns what goes into the record, as plain values."""

    @classmethod
    def reform(cls, network: nn.Module, form: Any) -> None:
        """Gives a new network the structure that `compress` created; idempotent.

        Raises:
            NotImplementedError: For a method that does not change the structure.
        """
        raise NotImplementedError(f"form must be of a method that changes one, but {cls.__name__} does not")

    def described(self) -> Record:
        """The method itself as plain values."""
        kind = type(self)
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def records_of(network: nn.Module) -> list[Record]:
    """The records of what was done to a network, in order."""
    return list(getattr(network, "compression", []))


def is_reformed(network: nn.Module) -> bool:
    """Whether a network's structure no longer follows from its config."""
    return any("form" in record for record in records_of(network))


def replay(network: nn.Module, records: Iterable[Record]) -> nn.Module:
    """Recreates the structure in records, before weights are loaded, and attaches the records to the network.

    Leading records that the network already has are skipped: their layers may have been removed or made smaller since.

    Raises:
        ValueError: When a record names no compression method, or does not fit the network.
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
    """The class that a record names.

    Raises:
        ValueError: When there is no such class, or it is not a subclass of `Compression`.
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
