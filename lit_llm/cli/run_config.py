"""`config.yaml`, which repeats a run, and the check that all processes of a run have the same options and data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_llm.cli import run_folder
from lit_llm.cli.finished_run import dotted
from lit_llm.files import replacing
from lit_llm.products import multiplies_bfloat16

ABOUT_ONE_RUN = {"run_dir", "ckpt_path", "config", "find_lr"}
"""Options left out of `config.yaml`, because a repetition of the run must not inherit them."""


class RunConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder; `lit-llm fit --config` with that file repeats the run.

    A resumed run rewrites the file only after its checkpoint was loaded: if that is refused, the file is unchanged.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes `config.yaml` when a new fit starts.

        Raises:
            ValueError: When processes have different options, or read different data.
        """
        if stage != "fit":
            return
        if dist.is_available() and dist.is_initialized():
            config = self._about_the_run(trainer)
            manifest = getattr(trainer.datamodule, "manifest", {})
            options = {name: value for name, value in config["trainer"].items() if name != "logger"}
            facts = {name: fact for name, fact in manifest.items() if name != "files"}
            fast = multiplies_bfloat16(trainer.strategy.root_device.type)  # Muon computes otherwise without
            require_same({**config, "trainer": options, "the data's": facts, "instructions for bfloat16": fast})
        if self.config.get("ckpt_path") is None:
            self._write(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `config.yaml` when a fit is resumed."""
        if self.config.get("ckpt_path") is not None:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        config = self._about_the_run(trainer)
        log_into_any(config["trainer"].get("logger"), Path(config["trainer"]["default_root_dir"]))
        config["trainer"]["default_root_dir"] = None
        with replacing(Path(trainer.default_root_dir) / "config.yaml") as new:
            new.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):  # a W&B logger: W&B compares runs by their config
                logger.log_hyperparams(config)

    def _about_the_run(self, trainer: Trainer) -> dict[str, Any]:
        """The resolved options without those of `ABOUT_ONE_RUN`; a precision `auto` is what it came to here."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        if config["trainer"]["precision"] == "auto":
            config["trainer"]["precision"] = trainer.precision
        return {key: value for key, value in config.items() if key not in ABOUT_ONE_RUN}


def log_into(loggers: Any, folder: Path) -> None:
    """Completes the options of loggers, in place: they save to the run folder if no other is given, and W&B gets an id.

    The id is stored in the run folder, so that a resumed run continues the same W&B run.
    """
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        options = getattr(logger, "init_args", None)
        if options is not None and "save_dir" in options and options["save_dir"] in (None, "."):
            options["save_dir"] = str(folder)
        if options is not None and {"id", "resume"} <= vars(options).keys() and options["id"] is None:
            options["id"], options["resume"] = run_folder.wandb_id(folder), "allow"
            os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # the default waits silently for 90 s


def log_into_any(loggers: Any, folder: Path) -> None:
    """Undoes `log_into`, in place, in options in the form of a YAML file."""
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        options = logger.get("init_args", {}) if isinstance(logger, dict) else {}
        if options.get("save_dir") == str(folder):
            options["save_dir"] = "."  # stands for the run folder: a repetition of the run logs into its own
            options |= {"id": None, "resume": None} if "id" in options else {}


def require_same(said: dict[str, Any]) -> None:
    """Checks that nested values are the same in all processes."""
    every: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, dict(dotted(said)))
    first = every[0]
    for rank, other in enumerate(every):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{name} must be the same in all processes, but is {other.get(name)} in process {rank} where "
                    f"process 0 has {first.get(name)}; tell all of them the same, --run_dir too"
                )
