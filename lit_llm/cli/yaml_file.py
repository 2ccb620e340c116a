"""The YAML file that `--config` names: reading it, and refusing unknown keys."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lit_llm.wording import did_you_mean, wrong_byte


def read_yaml(path: Path) -> Any:
    """Its content.

    Raises:
        FileNotFoundError: When it does not exist.
        ValueError: When it is not UTF-8 or not YAML.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"--config must be a file, but is {path}, which does not exist")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        place = f"at offset {error.start}"
        raise ValueError(f"--config must be UTF-8 text, but {path} {wrong_byte(error, place)}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config must be YAML, but {path} is not: {' '.join(str(error).split())}") from error


def require_keys(content: dict[str, Any], known: Collection[str], what: str) -> None:
    """Refuses unknown keys; `what` is what has them, in the message."""
    for key in content:
        if key not in known:
            raise ValueError(
                f"{what} must have keys of {', '.join(known)}, but has {key}{did_you_mean(str(key), known)}"
            )
