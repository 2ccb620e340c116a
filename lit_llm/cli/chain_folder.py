"""Whose a chain's folder is: what its stages were made of, so that none is taken for another."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

from lit_llm.cli.chain_file import Chain
from lit_llm.files import write_json

MEASURES = ("evaluate", "split", "metric", "calibration_batches")
"""What of a chain, beside its stages, decides what it makes and finds; floors and how models are timed do not."""

WRITTEN = ("model", "stages", "report.json", "config.yaml", "checkpoints", "config.json")
"""What there would be in a folder that a chain must not write to: others' models, runs, reports."""


def claim(out: Path, chain: Chain, model: str, folder: Path, options: list[str]) -> None:
    """Notes in `out` what is made there of what, and clears it of what an earlier chain measured, or began, otherwise.

    Args:
        out: The chain's folder.
        chain: What is to be done.
        model: What it is done to, as it was named.
        folder: Where that lies.
        options: What goes to each training and evaluation.

    Raises:
        ValueError: When that would lose something: a stage that was made otherwise, or what is no chain's. A chain that
            ends later or sooner than the earlier one loses none. Files that a run file names are not looked into.
    """
    made_of = {"chain": chain.content, "model": model, "options": options}
    made_of |= {"weights": _fingerprint(folder), "files": _files(chain)}
    settings, places = out / "chain.json", sorted(out.glob("stages/[0-9]*-*"))
    if settings.is_file():
        earlier = json.loads(settings.read_text())
        common, stale = _stages_in_common(earlier, made_of, chain), []
        if common == len(chain.stages):
            made_of["chain"] = earlier["chain"]  # which may go on
            made_of["files"] = earlier.get("files", {}) | made_of["files"]
        else:
            stale = [place for place in places if common is None or int(place.name.partition("-")[0]) > common]
        for place in stale:
            if any(next(place.glob(f"{made}/*"), None) for made in ("model", "checkpoints")):
                what = "another model or data" if common is None else "another chain"
                raise ValueError(
                    f"--out must be a new folder or one of this chain, but stage {place.name} of {out} is of {what}; "
                    f"name another, or delete the folders of that stage and those after it"
                )
        for place in stale:
            shutil.rmtree(place)
    elif other := next((name for name in WRITTEN if (out / name).exists()), None):
        raise ValueError(f"--out must be a new folder or one of a chain, but {out} holds {other}; name another")
    write_json(settings, made_of)


def _stages_in_common(earlier: dict[str, Any], now: dict[str, Any], chain: Chain) -> int | None:
    """How many stages two chains begin with alike; `None` where they start from, or measure by, something else.

    What a folder of an older version does not say is taken to be the same.
    """
    before = earlier.get("files", now["files"])
    edited = {name for name, content in now["files"].items() if before.get(name) != content}
    start = "weights" if "weights" in earlier else "model"  # the same weights may lie elsewhere now
    if any(earlier[key] != now[key] for key in (start, "options")) or any(
        earlier["chain"].get(key) != now["chain"].get(key) for key in MEASURES
    ):
        return None
    if edited & set(_named(now["chain"]["evaluate"])):
        return None
    works = ([stage | {"floor": None} for stage in made["chain"]["stages"]] for made in (earlier, now))
    stages = takewhile(lambda pair: pair[0] == pair[1], zip(*works, strict=False))
    return sum(1 for _ in takewhile(lambda pair: not edited & set(_named(pair[1].get("fit", []))), stages))


def _named(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else files


def _files(chain: Chain) -> dict[str, str]:
    """What the run files say that a chain names, by those names; comments and order of keys left out."""
    import yaml

    stages = zip(chain.content["stages"], chain.stages, strict=True)
    pairs = [(chain.content["evaluate"], chain.evaluate), *((said.get("fit", []), stage.fit) for said, stage in stages)]
    found = {}
    for name, file in (pair for names, files in pairs for pair in zip(_named(names), files, strict=True)):
        said = json.dumps(yaml.safe_load(Path(file).read_text(encoding="utf-8")), sort_keys=True, default=str)
        found[name] = hashlib.sha256(said.encode()).hexdigest()
    return found


def _fingerprint(folder: Path) -> str:
    """Of a model directory's weights and config."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
