"""Record of what the stages in a chain's folder were made from, so that no stage is reused for another chain."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

from lit_llm.cli.chain_file import Chain
from lit_llm.files import digest_of_yaml, write_json

MEASURES = ("evaluate", "split", "metric", "calibration_batches")
"""Keys of a chain, besides its stages, that change models and scores; floors and options of timing do not."""

WRITTEN = ("model", "stages", "report.json", "config.yaml", "checkpoints", "config.json")
"""Names that show that a folder without `chain.json` belongs to something else: a model, a run, a report."""


def claim(out: Path, chain: Chain, model: str, folder: Path, options: list[str]) -> None:
    """Records in `out` what the chain's stages are made from, and deletes outdated stages without model or checkpoint.

    A chain may have more or fewer stages than the earlier one in the folder. Files that run files refer to are not
    compared.

    Args:
        out: The chain's folder.
        chain: The chain.
        model: The model to compress, as the user named it.
        folder: The model's directory.
        options: Arguments that are passed to each training run and evaluation.

    Raises:
        ValueError: When an outdated stage has a model or checkpoints, or the folder holds something that is no chain's.
    """
    made_of = {"chain": chain.content, "model": model, "options": options}
    made_of |= {"weights": _fingerprint(folder), "files": _files(chain)}
    settings, places = out / "chain.json", sorted(out.glob("stages/[0-9]*-*"))
    if settings.is_file():
        earlier = json.loads(settings.read_text())
        common, stale = _stages_in_common(earlier, made_of, chain), []
        if common == len(chain.stages):
            made_of["chain"] = earlier["chain"]  # it may have further stages
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
    """Number of leading stages that two chains share; `None` if their models, options or evaluations differ.

    Facts that a folder of an older version does not record are taken to be the same.
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
    """Hashes of the run files' contents, by the names in the chain; comments and the order of keys do not count."""
    stages = zip(chain.content["stages"], chain.stages, strict=True)
    pairs = [(chain.content["evaluate"], chain.evaluate), *((said.get("fit", []), stage.fit) for said, stage in stages)]
    named = (pair for names, files in pairs for pair in zip(_named(names), files, strict=True))
    return {name: digest_of_yaml(Path(file)) for name, file in named}


def _fingerprint(folder: Path) -> str:
    """Hash of a model directory's weights and config."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
