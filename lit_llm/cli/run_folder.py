"""The one folder that a run writes to: where it is, and which checkpoint of it is meant."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

import yaml

from lit_llm.checkpoint_files import own_checkpoint

VARIABLE = "LIT_LLM_RUN_DIR"
"""Tells the processes that a strategy starts where the first one writes."""


def choose(command: str, given: str | None, config: Path | None, ckpt_path: str | None) -> Path:
    """Decides on the run folder.

    Args:
        command: The sub-command.
        given: What `--run_dir` says.
        config: The first run file; gives the default folder its name.
        ckpt_path: What `--ckpt_path` says: `last` and `best` without a folder mean the newest run of that name.

    Raises:
        FileNotFoundError: When there is no such run.
    """
    if VARIABLE in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(os.environ[VARIABLE])
    if given:
        return Path(given).expanduser()
    if ckpt_path not in (None, "last", "best") and Path(ckpt_path).parent.name == "checkpoints" and command != "fit":
        return Path(ckpt_path).parent.parent
    family = Path("runs") / _name(command, config)
    if ckpt_path in ("last", "best"):
        ran = list(family.glob(f"*/checkpoints/{ckpt_path}.ckpt"))
        if not ran:
            raise FileNotFoundError(
                f"ckpt_path must be in a run folder, but {family} holds none with {ckpt_path}.ckpt; name one: --run_dir"
            )
        return max(ran, key=lambda path: path.stat().st_mtime).parent.parent
    job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
    if job and job != "none":
        return family / job
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))  # of one second's runs
    return next(family / name for name in names if not (family / name).exists())


def _name(command: str, config: Path | None) -> str:
    if config is None:
        return command
    # A run's own config.yaml lies in runs/<name>/<time>/.
    return config.parent.parent.name if config.stem == "config" else config.stem


def wandb_id(folder: Path) -> str | None:
    """The name by which Weights & Biases knows the run, its agent's where one started it: the same when it goes on."""
    path = folder / "wandb_id.txt"
    if not path.exists() and os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        path.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8") if path.exists() else None


def find_checkpoint(folder: Path, ckpt_path: str) -> Path:
    """The file that `last`, `best` or a path means.

    Raises:
        FileNotFoundError: When there is none.
    """
    if ckpt_path not in ("last", "best"):
        if not Path(ckpt_path).exists():
            raise FileNotFoundError(
                f"ckpt_path must be last, best or a checkpoint file, but is {ckpt_path}, which does not exist"
            )
        return Path(ckpt_path)
    path = folder / "checkpoints" / f"{ckpt_path}.ckpt"
    if not path.exists():
        found = ", ".join(p.stem for p in sorted(path.parent.glob("*.ckpt"))) or "none"
        raise FileNotFoundError(f"ckpt_path must be a checkpoint in {path.parent} (there: {found}), but is {ckpt_path}")
    return path


def of_evaluation(folder: Path, command: str, options: dict[str, Any], checkpoint: Path) -> Path:
    """Where what an evaluation finds is written: in the run folder, if it is the run's own.

    Another one's figures would stand among those of the run, and pass for them, so it has a folder within: where the
    data, how many batches of them are read, the model's options or the checkpoint are others.

    Args:
        folder: The run folder.
        command: `validate` or `test`.
        options: All that is told, as `config.yaml` has it.
        checkpoint: What is evaluated.
    """
    if not (folder / "config.yaml").is_file():
        return folder
    own = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    limit = f"limit_{'val' if command == 'validate' else 'test'}_batches"
    here, there = (_evaluated(of, limit) for of in (options, own))
    if here == there and checkpoint.resolve() == own_checkpoint(folder).resolve():
        return folder
    what = json.dumps([here, str(checkpoint.resolve())], sort_keys=True, default=str)
    return folder / "evaluations" / f"{command}-{hashlib.blake2b(what.encode(), digest_size=4).hexdigest()}"


def _evaluated(options: dict[str, Any], limit: str) -> dict[str, Any]:
    """What decides about figures; where all is read, in batches of any size."""
    batches = options["trainer"].get(limit)
    batches = None if isinstance(batches, float) and batches == 1 else batches
    data = dict(options["data"])
    if batches is None:
        data["init_args"] = {k: v for k, v in (data.get("init_args") or {}).items() if k != "batch_size"}
    return {"model": options["model"], "data": data, limit: batches}


def leave(folder: Path) -> None:
    """Takes a folder away again in which nothing was written; also the one that holds those of evaluations."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == ["wandb_id.txt"]:
            (folder / "wandb_id.txt").unlink()
        folder.rmdir()
        if folder.parent.name == "evaluations":
            folder.parent.rmdir()


def make(folder: Path, starts_anew: bool, trains: bool) -> None:
    """Makes the folder.

    Args:
        folder: The run folder.
        starts_anew: Whether a run begins in it, rather than goes on or is looked at.
        trains: Whether that run is a training, which leaves a model.

    Raises:
        ValueError: When it cannot be written to, or a new run would overwrite another's checkpoints or model.
    """
    there = {path.stem for path in (folder / "checkpoints").glob("*.ckpt")}
    if starts_anew and there:
        some = str(folder / "checkpoints" / f"{min(there)}.ckpt")
        latest = next((name for name in ("last", "best") if name in there), some)
        raise ValueError(
            f"run_dir must be a new folder, but {folder} holds a run; go on with --ckpt_path {latest}, or choose "
            f"another"
        )
    if starts_anew and trains and (folder / "model").exists():
        raise ValueError(f"run_dir must be a new folder, but {folder} holds the model of a run; choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run_dir must be a folder that can be written to, but is {folder}: {error.strerror}"
        ) from error
    os.environ[VARIABLE] = str(folder)
