"""What commands share whose options are plain: a parser whose errors are one line, a file to write, a device."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_llm.cli import fail

if TYPE_CHECKING:
    from torch import nn


class OneLineArguments(argparse.ArgumentParser):
    """The standard library's parser, for commands that should answer before torch is imported.

    Paths may begin with `~`, which the shell leaves as it is after a `=`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))

    def error(self, message: str) -> NoReturn:
        """Prints the line, with where help is, and exits with code 2."""
        fail(f"{message}; see {self.prog} --help")


def require_writable(json: Path | None) -> None:
    """Ends the command before its work where the file for its figures could not be written after it."""
    if json is None:
        return
    folder = next(parent for parent in json.absolute().parents if parent.exists())
    if json.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        fail(f"--json must be a file in a folder that can be written to, but is {json}")


def moved(network: nn.Module, device: str) -> nn.Module:
    """A network on a device by name, `auto` being the accelerator, where there is one.

    Raises:
        ValueError: When torch does not find such a device here.
    """
    import torch

    if device == "auto":
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        return network.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that torch finds here, but is {device}: {error}") from error
