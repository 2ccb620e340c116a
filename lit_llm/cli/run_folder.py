"""The run folder: its path, its creation, and the choice of a checkpoint in it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

import yaml

from lit_llm.checkpoint_files import own_checkpoint

VARIABLE = "LIT_LLM_RUN_DIR"
"""Environment variable that passes the run folder to the processes that a strategy starts."""


def choose(command: str, given: str | None, config: Path | None, ckpt_path: str | None) -> Path:
    """Decides on the run folder.

    Args:
        command: The sub-command.
        given: Value of `--run_dir`.
        config: The first run file; the default folder is named after it.
        ckpt_path: Value of `--ckpt_path`; `last` and `best` without `given` mean the run whose `config.yaml` is
            `config`, or else the newest run with such a checkpoint among those named after it.

    Raises:
        FileNotFoundError: When `last` or `best` is asked for, and none of these runs has it.
    """
    if VARIABLE in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(os.environ[VARIABLE])
    if given:
        return Path(given).expanduser()
    if ckpt_path not in (None, "last", "best") and Path(ckpt_path).parent.name == "checkpoints" and command != "fit":
        return Path(ckpt_path).parent.parent
    family = Path("runs") / _name(command, config)
    if ckpt_path in ("last", "best"):
        if own := of_config(config):
            return own
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
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))  # runs of one second
    return next(family / name for name in names if not (family / name).exists())


def _name(command: str, config: Path | None) -> str:
    if config is None:
        return command
    # A run's own config.yaml lies in runs/<name>/<time>/.
    return config.parent.parent.name if config.stem == "config" else config.stem


def of_config(config: Path | None) -> Path | None:
    """The folder of the run whose `config.yaml` a run file is; `None` where it is of none."""
    is_of_a_run = config is not None and config.name == "config.yaml" and (config.parent / "checkpoints").is_dir()
    return config.parent if is_of_a_run else None


def wandb_id(folder: Path) -> str | None:
    """The run's id at Weights & Biases, stored in its folder so that it stays the same when the run is resumed.

    It is that of W&B's agent (`WANDB_RUN_ID`) if one started the run.
    """
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
        there = [p.stem for p in sorted(path.parent.glob("*.ckpt"))]
        other = next((name for name in ("last", "best") if name in there), None)
        remedy = f"; take --ckpt_path {other}" if other else ""
        raise FileNotFoundError(
            f"ckpt_path must be a checkpoint in {path.parent} (there: {', '.join(there) or 'none'}), but is "
            f"{ckpt_path}{remedy}"
        )
    return path


def is_of_another(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint belongs to a run in another folder."""
    return checkpoint.parent.name == "checkpoints" and checkpoint.parent.parent.resolve() != folder.resolve()


def of_evaluation(folder: Path, command: str, options: dict[str, Any], checkpoint: Path) -> Path:
    """The folder for the results of an evaluation: the run folder, or a subfolder of it.

    It is a subfolder if the data, the number of batches, the model's options or the checkpoint differ from the run's
    own, because the results would otherwise be taken for those of the run.

    Args:
        folder: The run folder.
        command: `validate`, `test` or `predict`.
        options: All options, in the form of `config.yaml`.
        checkpoint: The checkpoint that is evaluated.
    """
    if not (folder / "config.yaml").is_file():
        return folder
    own = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    limit = f"limit_{'val' if command == 'validate' else command}_batches"
    here, there = (_evaluated(of, limit) for of in (options, own))
    if here == there and checkpoint.resolve() == own_checkpoint(folder).resolve():
        return folder
    what = json.dumps([here, str(checkpoint.resolve())], sort_keys=True, default=str)
    return folder / "evaluations" / f"{command}-{hashlib.blake2b(what.encode(), digest_size=4).hexdigest()}"


def _evaluated(options: dict[str, Any], limit: str) -> dict[str, Any]:
    """The options that decide the results; the batch size is not one of them if all batches are read."""
    batches = options["trainer"].get(limit)
    batches = None if isinstance(batches, float) and batches == 1 else batches
    data = dict(options["data"])
    if batches is None:
        data["init_args"] = {k: v for k, v in (data.get("init_args") or {}).items() if k != "batch_size"}
    return {"model": options["model"], "data": data, limit: batches}


def leave(folder: Path) -> None:
    """Removes a run folder in which nothing was written, and `evaluations` if that becomes empty."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == ["wandb_id.txt"]:
            (folder / "wandb_id.txt").unlink()
        folder.rmdir()
        if folder.parent.name == "evaluations":
            folder.parent.rmdir()


def make(folder: Path, starts_anew: bool, trains: bool) -> None:
    """Creates the folder.

    Args:
        folder: The run folder.
        starts_anew: Whether a new run starts in it, rather than that one is resumed or evaluated.
        trains: Whether the new run is a training, which exports a model.

    Raises:
        ValueError: When it cannot be created, or a new run would overwrite another's checkpoints or model, or a
            `config.yaml` that no run has written.
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
    if starts_anew and trains and not _is_of_a_run(folder / "config.yaml"):
        raise ValueError(
            f"run_dir must be a new folder, but {folder} holds a config.yaml that no run has written; choose another, "
            f"or rename that file"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run_dir must be a folder that can be written to, but is {folder}: {error.strerror}"
        ) from error
    os.environ[VARIABLE] = str(folder)


def _is_of_a_run(config: Path) -> bool:
    """Whether a run may overwrite this file: where there is none, or all options are in it, as a run writes them."""
    if not config.is_file():
        return True
    return re.search(r"^ +default_root_dir:", config.read_text(encoding="utf-8"), re.MULTILINE) is not None
