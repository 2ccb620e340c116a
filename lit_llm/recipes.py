"""Recipes of networks (a class path and plain arguments, as in configs and checkpoints), and building from them."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from lit_llm.schedulers import Schedule


def class_path(kind: type) -> dict[str, Any]:
    """A class as a config names it."""
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}"}


def first_argument(kind: type) -> str:
    """Name of a network's first argument, which gives its size: `vocab_size`, `num_classes`."""
    return next(iter(inspect.signature(kind).parameters))


def plain(value: Any) -> Any:
    """A dataclass as a class path and arguments, an enum member as its name, a path as text; also inside containers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return class_path(type(value)) | {"init_args": {name: plain(v) for name, v in vars(value).items()}}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, dict):
        return {plain(key): plain(v) for key, v in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(plain(v) for v in value)
    return value


def described(name: str, value: Any) -> Any:
    """A value that a checkpoint can hold without pickling: a class, partial or schedule becomes its class path.

    Raises:
        TypeError: For a function, which could not be rebuilt.
    """
    made_from = value.func if isinstance(value, functools.partial) else value
    if callable(made_from) and getattr(made_from, "__module__", "").startswith("jsonargparse"):
        return None  # in `load_from_checkpoint`; `on_load_checkpoint` knows the recipe
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
    """Builds what a recipe describes: a network, or a plain value.

    Args:
        recipe: `class_path` and `init_args`.
        path: The checkpoint that it is from, for messages.
        first: The network's first argument, its size; nothing for a plain value.

    Raises:
        ValueError: When the class does not exist, is neither a torch module nor (without `first`) a dataclass, takes
            other arguments, or has annotations from which an argument cannot be rebuilt.
    """
    whose = f"network in {path}"
    kind = _class_of(recipe, whose, network=bool(first))
    arguments = _arguments(kind, recipe, whose)
    try:
        inspect.signature(kind).bind(*first, **arguments)
    except TypeError as error:
        raise ValueError(
            f"{whose} must be told what a {kind.__name__} takes, but is of another version of it: {error}"
        ) from error
    return kind(*first, **arguments)


def require_rebuildable(recipe: dict[str, Any], make: Any) -> None:
    """Checks that a network's arguments can be rebuilt from a checkpoint unchanged, if its class can be imported.

    Args:
        recipe: What the checkpoint will hold.
        make: What makes the network now; the arguments of a `functools.partial` are compared.

    Raises:
        ValueError: When an argument would change; the message names it.
    """
    try:
        kind = _class_of(recipe, "model.network", network=True)
    except ValueError:  # a function, or a class defined in one, can be trained too, but no file can name it
        return
    with torch.random.fork_rng(devices=[]):  # modules among the arguments draw random weights
        again = _arguments(kind, recipe, "model.network")
    for name, value in (make.keywords if isinstance(make, functools.partial) else {}).items():
        made = again.get(name)
        if not (callable(made) if callable(value) else type(value) is type(made) and value == made):
            raise _unfit(_part("model.network", name), _parameters(kind).get(name, UNKNOWN)[0], value)


UNKNOWN = (Any, inspect.Parameter.empty)
"""Annotation and default of a parameter that no constructor declares."""


def _class_of(recipe: dict[str, Any], whose: str, network: bool = False) -> type:
    """The class that a recipe names: a torch module or, unless it must be a network, a dataclass."""
    module, _, name = str(recipe.get("class_path")).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{whose} must be a class that can be imported, but is not: {error}") from error
    # Nothing else may be called from a file: only networks and, among their arguments, modules and dataclasses.
    made = isinstance(kind, type) and (issubclass(kind, nn.Module) or (not network and dataclasses.is_dataclass(kind)))
    if not made:
        rule = "a torch module" if network else "a torch module or a dataclass"
        raise ValueError(f"{whose} must be {rule}, but is {recipe['class_path']}")
    return kind


def _part(whose: str, name: str) -> str:
    """Name of an argument of `whose` in messages: `network.act in best.ckpt`."""
    owner, *place = whose.split(" ", 1)
    return " ".join([f"{owner}.{name}", *place])


def _unfit(whose: str, hint: Any, value: Any) -> ValueError:
    said = "none" if hint is Any else hint.__name__ if isinstance(hint, type) else str(hint)
    return ValueError(
        f"{whose} must be what a checkpoint can make again by its annotation, {said}, but is {value!r}; let it be a "
        f"plain type, an enum, a dataclass or a torch module, and be annotated so"
    )


def _arguments(kind: type, recipe: dict[str, Any], whose: str) -> dict[str, Any]:
    """The arguments of a recipe, converted from plain values to what the constructor's annotations say."""
    parameters, found = _parameters(kind), {}
    for name, value in (recipe.get("init_args") or {}).items():
        hint, default = parameters.get(name, UNKNOWN)
        said = _said(default)
        is_default = type(value) is type(said) and value == said
        try:
            found[name] = default if is_default and hint is Any else _fitted(value, hint, _part(whose, name))
        except (TypeError, ValueError) as error:
            if not is_default:
                raise error if isinstance(error, ValueError) else _unfit(_part(whose, name), hint, value) from error
            found[name] = default
    return found


def _said(default: Any) -> Any:
    """How a config writes a default value: a function as its path, a `torch.dtype` as text."""
    if callable(default) and hasattr(default, "__qualname__"):
        return f"{default.__module__}.{default.__qualname__}"
    said = plain(default)
    return said if isinstance(said, (bool, int, float, str, list, tuple, set, dict)) or said is None else str(said)


def _parameters(kind: type) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each parameter of a constructor and of the base classes' constructors."""
    found = {}
    for base in reversed(kind.__mro__):
        try:
            parameters, hints = inspect.signature(base.__init__).parameters, typing.get_type_hints(base.__init__)
        except (NameError, TypeError, ValueError):  # an annotation cannot be resolved, or the class is written in C
            continue
        found |= {name: (hints.get(name, Any), parameter.default) for name, parameter in parameters.items()}
    return found


def _fitted(value: Any, hint: Any, whose: str) -> Any:
    """Converts a plain value to an annotated type, as the command line does.

    Raises:
        TypeError: When that is not possible.
    """
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    members = inner if origin in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, dict) and "class_path" in value:
        return _nested(value, members, whose)
    if len(members) > 1:
        for member in sorted(members, key=lambda member: member in (Any, object)):
            try:
                return _fitted(value, member, whose)
            except (TypeError, ValueError):
                continue
    elif origin in (Any, object) or isinstance(hint, typing.TypeVar) or (origin is typing.Literal and value in inner):
        return value
    elif origin in (type, Callable) and isinstance(value, str):
        return _nested({"class_path": value}, members, whose)
    elif isinstance(value, dict) and (origin in (dict, Mapping, MutableMapping) or typing.is_typeddict(hint)):
        key, item = inner or (Any, Any)
        return {_fitted(k, key, whose): _fitted(v, item, whose) for k, v in value.items()}
    elif isinstance(value, (list, tuple, set)) and origin in (list, tuple, set, frozenset, Sequence, Iterable):
        items = inner if origin is tuple and ... not in inner and inner else (inner[:1] or (Any,)) * len(value)
        if len(items) == len(value):
            make = origin if origin in (tuple, set, frozenset) else type(value)
            return make(_fitted(v, item, whose) for v, item in zip(value, items, strict=True))
    elif isinstance(hint, type):
        return _of_class(value, hint, whose)
    raise TypeError


def _of_class(value: Any, hint: type, whose: str) -> Any:
    """Does the work of `_fitted` for an annotation that is a class."""
    if issubclass(hint, enum.Enum) and isinstance(value, str):
        if value not in hint.__members__:
            raise TypeError
        return hint[value]
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return hint(**_arguments(hint, {"init_args": value}, whose))
    if issubclass(hint, PurePath) and isinstance(value, str):
        return hint(value)
    if hint is torch.dtype and isinstance(getattr(torch, str(value).removeprefix("torch."), None), torch.dtype):
        return getattr(torch, str(value).removeprefix("torch."))
    plain_types = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}  # or jsonargparse's subclasses of them
    allowed = next((types for base, types in plain_types.items() if issubclass(hint, base)), None)
    if (type(value) in allowed) if allowed else isinstance(value, hint):
        return value
    raise TypeError


def _nested(recipe: dict[str, Any], members: tuple[Any, ...], whose: str) -> Any:
    """What a class path among the arguments stands for: an instance or, if annotated so, the class or a partial of it.

    Raises:
        TypeError: When the annotation allows none of them.
    """
    kind = _class_of(recipe, whose)
    origins = {typing.get_origin(member) or member for member in members}
    classes = tuple(o for o in origins - {Any, type, Callable} if isinstance(o, type))
    if Any in origins or issubclass(kind, classes):
        return kind(**_arguments(kind, recipe, whose))
    if type in origins:
        return kind
    if Callable in origins:
        return functools.partial(kind, **_arguments(kind, recipe, whose))
    raise TypeError
