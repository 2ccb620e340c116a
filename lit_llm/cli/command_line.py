"""Arguments of a training command: completion by the run's own config, checks of run files, the parser, help."""

from __future__ import annotations

import enum
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lit_llm.cli import fail
from lit_llm.cli.errors import parser_line
from lit_llm.wording import wrong_byte

# A config holds an enumeration's value where a default of an argument for text is one, as in Lightning's `Timer`.
yaml.SafeDumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_data(member.value))


def _options(words: list[str], name: str) -> list[str]:
    """The values of an option on the command line, before it is parsed."""
    return [word.split("=", 1)[1] for word in words if word.startswith(name + "=")] + [
        value for word, value in itertools.pairwise(words) if word == name
    ]


def _option(words: list[str], name: str) -> str | None:
    """The first value of an option on the command line; `None` if it is not given."""
    return next(iter(_options(words, name)), None)


def run_files(words: list[str]) -> list[str]:
    """The files that a command line names by `--config` or `-c`."""
    return _options(_spelled_out(words), "--config")


def _spelled_out(words: list[str]) -> list[str]:
    """Replaces `-c FILE`, `-c=FILE` and `-cFILE` by `--config`."""
    short = re.compile(r"-c=?(.*)", re.DOTALL)
    found = ((word, short.fullmatch(word)) for word in words)
    return [word if match is None else f"--config={match[1]}" if match[1] else "--config" for word, match in found]


def _files_first(words: list[str]) -> list[str]:
    """Moves options that come before the first run files behind these, which would otherwise override them.

    Later options and overlays keep their order: `--trainer.callbacks.window 4` is of the last callback before it.
    """
    is_file = [word.partition("=")[0] == "--config" for word in words]
    start = end = is_file.index(True) if any(is_file) else 0
    while end < len(words) and is_file[end]:
        end += 1 if "=" in words[end] else 2
    return [*words[start:end], *words[:start], *words[end:]]


def _from_home(words: list[str]) -> list[str]:
    """Expands `~` in `--run_dir` and `--ckpt_path`, because the shell does not after a `=`."""
    paths, read = ("--run_dir", "--ckpt_path"), []
    for before, word in itertools.pairwise(["", *words]):
        name, equals, value = word.partition("=")
        if equals and name in paths:
            word = name + equals + os.path.expanduser(value)
        read.append(os.path.expanduser(word) if before in paths else word)
    return read


def _is_overlay(options: dict[str, Any] | None) -> bool:
    """Whether a run file is an overlay: it names neither the class of the model nor that of the data."""
    kinds = [options.get(name) for name in ("model", "data")] if options is not None else [""]
    return not any(isinstance(kind, str) or (isinstance(kind, dict) and "class_path" in kind) for kind in kinds)


def _options_of(file: str) -> dict[str, Any] | None:
    """The options in a run file; `None` where the parser will say why it cannot be read.

    Refuses a file without options, or that names a missing YAML file: the parser would not name the run file.
    """
    try:
        content = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        place = f"at offset {error.start}"
        raise ValueError(f"config must be UTF-8 text, but {file} {wrong_byte(error, place)}") from error
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(content, dict):
        found = "none" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"config must hold options by their names, but {file} holds {found}")
    folder, data = Path(file).expanduser().parent, content.get("data")
    _require_yaml("model", content.get("model"), folder)
    _require_yaml("data", data if isinstance(data, str) else None, folder)
    return content


def _require_yaml(name: str, value: Any, folder: Path) -> None:
    """Checks that YAML files exist that a run file in `folder` names for its data, its model or parts of the model."""
    if isinstance(value, dict):
        for key, nested in value.items():
            _require_yaml(name if key == "init_args" else f"{name}.{key}", nested, folder)
    elif str(value).endswith((".yaml", ".yml")) and not (folder / Path(value).expanduser()).exists():
        raise FileNotFoundError(
            f"{name} must be a class path or a YAML file, but is {value}, which does not exist in {folder}"
        )


def with_the_runs_config(words: list[str]) -> list[str]:
    """Puts the first run files before the other options, and the run's own config if no config is given.

    To resume or evaluate a run, its own config also comes first if the given configs are all overlays. The folder may
    be named by the path of a checkpoint in it.

    Raises:
        FileNotFoundError: When the run to resume or evaluate has no config, and no other options say what it is.
        ValueError: When a run file does not hold options.
    """
    words = [words[0], *_files_first(_from_home(_spelled_out(words[1:])))]
    run_dir, ckpt_path = _option(words, "--run_dir"), Path(_option(words, "--ckpt_path") or "")
    if run_dir is None and ckpt_path.parent.name == "checkpoints":
        run_dir = str(ckpt_path.parent.parent)
    named = [_options_of(file) for file in run_files(words)]
    goes_on = words[0] != "fit" or _option(words, "--ckpt_path")
    if run_dir is None or (named and not (goes_on and all(map(_is_overlay, named)))):
        return words
    folder, config = Path(run_dir), Path(run_dir) / "config.yaml"
    if config.is_file():
        return [words[0], "--config", str(config), *words[1:]]
    others = {"--model", "--data", "-h", "--help", "--print_config"}
    if goes_on and not named and not {word.split("=")[0] for word in words} & others:
        lacks = "holds no config.yaml" if folder.is_dir() else "does not exist"
        model = f"; name a run file with --config, and its model as --model.weights {folder / 'model'}"
        remedy = model if (folder / "model").is_dir() else ""
        name = "run_dir" if _option(words, "--run_dir") else "the folder of ckpt_path"
        raise FileNotFoundError(f"{name} must be a run folder, but is {run_dir}, which {lacks}{remedy}")
    return words


class OneLineParser(LightningArgumentParser):
    """A parser that reports errors of the command line in one line.

    Options cannot be abbreviated: an abbreviated `--config` or `--ckpt_path` would not be seen before parsing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the line and exits with code 2."""
        fail(parser_line(message, [action.dest for action in self._actions], sys.argv, ex))


class ParagraphHelp(DefaultHelpFormatter):
    """A help formatter that keeps the line breaks of a description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def restore_nulls(config: Namespace) -> None:
    """Replaces the text `None` by null, in place: jsonargparse makes that text of a flag's `null` inside a class."""
    for name, value in vars(config).items():
        if isinstance(value, Namespace):
            restore_nulls(value)
        elif value == "None":
            config[name] = None
