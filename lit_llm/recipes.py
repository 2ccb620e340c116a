"""How a network is made, as a config and a checkpoint say it: a class path and arguments, plain values; and back."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from lit_llm.schedulers import Schedule


def class_path(kind: type) -> dict[str, Any]:
    """A class as a config names it."""
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}"}


def first_argument(kind: type) -> str:
    """What sizes a network: `vocab_size`, `num_classes`."""
    return next(iter(inspect.signature(kind).parameters))


def plain(value: Any) -> Any:
    """A dataclass as a class path and arguments; any other value as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return class_path(type(value)) | {"init_args": dict(vars(value))}
    return value


def described(name: str, value: Any) -> Any:
    """A value that a checkpoint can hold without pickling: a class, partial or schedule becomes its path.

    Raises:
        TypeError: For a function, of which nothing could be rebuilt.
    """
    made_from = value.func if isinstance(value, functools.partial) else value
    if callable(made_from) and getattr(made_from, "__module__", "").startswith("jsonargparse"):
        return None  # `load_from_checkpoint` at work; `on_load_checkpoint` knows what this was made from
    if isinstance(value, functools.partial):
        return described(name, value.func) | {"init_args": {n: described(n, v) for n, v in value.keywords.items()}}
    if isinstance(value, type):
        return class_path(value)
    if isinstance(value, Schedule):
        return class_path(type(value)) | {"init_args": vars(value)}
    if callable(value):
        raise TypeError(
            f"{name} must be a class or a functools.partial of one, so that a checkpoint can rebuild it, but is {value}"
        )
    return plain(value)


def built(recipe: dict[str, Any], path: Path, *first: Any) -> Any:
    """What a class path and arguments describe: a network, or a plain value among its arguments.

    Args:
        recipe: `class_path` and `init_args`.
        path: The checkpoint that it is from.
        first: What sizes a network; nothing for a plain value.

    Raises:
        ValueError: When there is no such class, or it is neither a torch module nor, without `first`, a dataclass.
    """
    module, _, name = str(recipe.get("class_path")).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"network in {path} must be a class that can be imported, but is not: {error}") from error
    # Nothing else is called: a network, with its size, or among its arguments a plain value.
    if not (isinstance(kind, type) and (issubclass(kind, nn.Module) if first else dataclasses.is_dataclass(kind))):
        raise ValueError(f"network in {path} must be a torch module, but is {recipe['class_path']}")
    arguments = {
        name: built(value, path) if isinstance(value, dict) and "class_path" in value else value
        for name, value in recipe.get("init_args", {}).items()
    }
    return kind(*first, **arguments)
