"""A parser whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lit_llm.cli import fail


class OneLineArguments(argparse.ArgumentParser):
    """The standard library's parser, for commands that should answer before torch is imported."""

    def error(self, message: str) -> NoReturn:
        """Prints the line, with where help is, and exits with code 2."""
        fail(f"{message}; see {self.prog} --help")
        raise AssertionError
