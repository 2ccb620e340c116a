"""Cache folders, each named by a hash of everything that determines its content, and never visible half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_llm.files import replacing

FORMAT = 1


def cache_folder() -> Path:
    """The folder of all caches: `LIT_LLM_CACHE`, or `lit-llm` in the user's cache folder."""
    if own := os.environ.get("LIT_LLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit-llm"


def cache_name(**parts: Any) -> str:
    """A folder name: a hash of everything that determines a cache's content."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def stamps(files: list[Path]) -> str:
    """A hash of files' paths, sizes and modification times: instant, and as good as their content unless forged."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        stat = path.stat()
        digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the cache in a folder; `None` if there is no cache or it is incomplete."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


@contextmanager
def new_cache(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields a folder to write a cache to, and its manifest to fill; both appear as `folder` once complete.

    If another process has completed the same cache meanwhile, that one stays, since it may be in use.

    Example:
        >>> place = Path(__import__("tempfile").mkdtemp()) / "x"
        >>> with new_cache(place) as (new, manifest):
        ...     manifest["lines"] = (new / "a.txt").write_text("whole")
        >>> read_manifest(place)
        {'lines': 5, 'files': {'a.txt': 5}}
    """
    with replacing(folder) as new:
        new.mkdir()
        manifest: dict[str, Any] = {}
        yield new, manifest
        manifest["files"] = {str(p.relative_to(new)): p.stat().st_size for p in sorted(new.rglob("*")) if p.is_file()}
        (new / "manifest.json").write_text(json.dumps(manifest, indent=2))
        if read_manifest(folder) is not None:
            shutil.rmtree(new)
