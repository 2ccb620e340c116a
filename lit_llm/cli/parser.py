"""Shared parts of the commands that use argparse: a parser with one-line errors, checks of `--json` and `--device`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_llm.cli import fail

if TYPE_CHECKING:
    from torch import nn


class OneLineArguments(argparse.ArgumentParser):
    """`argparse.ArgumentParser` with one-line errors, for commands that must parse options before torch is imported.

    Expands `~` at the start of paths, because the shell does not after a `=`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))

    def error(self, message: str) -> NoReturn:
        """Prints the message with a hint at `--help`, and exits with code 2."""
        fail(f"{message}; see {self.prog} --help")


def require_writable(json: Path | None) -> None:
    """Ends the command before its work if the `--json` file could not be written afterwards."""
    if json is None:
        return
    folder = next(parent for parent in json.absolute().parents if parent.exists())
    if json.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        fail(f"--json must be a file in a folder that can be written to, but is {json}")


def moved(network: nn.Module, device: str) -> nn.Module:
    """Moves a network to a device by name; `auto` is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: When torch does not find such a device.
    """
    import torch

    if device == "auto":
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        return network.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that torch finds here, but is {device}: {error}") from error
