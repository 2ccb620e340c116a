"""`lit-llm fit|validate|test|predict`: LightningCLI with a run folder."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_llm.callbacks.learning_rate_finder import LearningRateFinder
from lit_llm.callbacks.run_report import command
from lit_llm.checkpoint_files import own_checkpoint
from lit_llm.cli import COMMANDS, STOPPED, find_lr, from_checkpoint, run_folder
from lit_llm.cli.allocator import keep_freed_memory
from lit_llm.cli.command_line import OneLineParser, ParagraphHelp, restore_nulls, with_the_runs_config
from lit_llm.cli.errors import one_line
from lit_llm.cli.lean_loop import skip_empty_hooks
from lit_llm.cli.quiet import quieten
from lit_llm.cli.run_config import RunConfig, log_into
from lit_llm.cli.standard_parts import CheckpointOptions, standard_parts
from lit_llm.cli.trainer import RunTrainer
from lit_llm.cli.trainer_options import require_end, require_sound
from lit_llm.files import locked, read_results
from lit_llm.products import multiply_by_onednn

log = logging.getLogger(__name__)

EXAMPLES = """

A run is described by a YAML file given by --config. Further --config files are overlays on top of it, and any value can
be set with a dotted flag such as --model.network.d_model 128. The run writes everything to --run_dir: config.yaml,
metrics.csv, results.json, learning_curve.png, samples.txt, checkpoints/ and model/.

examples:
  lit-llm fit --config configs/pretraining/llama_stdlib.yaml
  lit-llm fit --config configs/pretraining/llama_stdlib.yaml --config configs/logging/wandb.yaml --trainer.max_steps 100
  lit-llm fit --config configs/pretraining/llama_stdlib.yaml --data.path texts/ --data.tokenizer bpe-8192
  lit-llm fit --run_dir runs/llama_stdlib/2026-01-31_12-00-00 --ckpt_path last      # resume where it stopped
  lit-llm test --run_dir runs/llama_stdlib/2026-01-31_12-00-00                      # its best checkpoint
  lit-llm fit --config configs/pretraining/llama_stdlib.yaml --find_lr true         # suggests learning rates
  lit-llm fit --config configs/pretraining/llama_stdlib.yaml --print_config         # the resulting config
  lit-llm fit --data.help lit_llm.data.glue.GLUEData                                # the options of a class"""


def run(words: list[str], summary: bool = True) -> TrainingCLI:
    """Runs a training command; `words` is the whole command line after `lit-llm`.

    Args:
        words: The command line.
        summary: Whether to print the run folder and the results. A caller without it, such as a notebook, reads
            `run_dir`, `results`, `model`, `datamodule` and `trainer` of the returned object.
    """
    keep_freed_memory()
    cli = TrainingCLI if summary else SilentCLI
    return _parsed(cli, words)


def run_stage(words: list[str]) -> TrainingCLI:
    """As `run`, for a command of which this is a stage, and which is itself run again to resume it."""
    keep_freed_memory()
    return _parsed(StageCLI, words)


def read_run(words: list[str]) -> ConfigCLI:
    """Instantiates only the model and the data module that the arguments `words` of `lit-llm fit` describe."""
    return _parsed(ConfigCLI, ["fit", *words])


def _parsed(cli: type[TrainingCLI], words: list[str]) -> Any:
    quieten()
    multiply_by_onednn()
    # W&B's agent writes a sweep's values in Python syntax: `None` for null.
    words = [re.sub(r"^(--[^=]+=)None$", r"\1null", word) for word in with_the_runs_config(words)]
    sys.argv = [sys.argv[0], *words]
    return cli(
        LightningModule,
        LightningDataModule,
        trainer_class=RunTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=OneLineParser,
        save_config_callback=RunConfig,
        seed_everything_default=1337,
        auto_configure_optimizers=False,
        trainer_defaults={"enable_model_summary": False},
    )


class TrainingCLI(LightningCLI):
    """LightningCLI with a run folder that holds everything a run writes."""

    run_dir: Path | None = None
    """The folder to which this command writes."""

    of_run: Path | None = None
    """The folder of the run that is trained or evaluated; differs from `run_dir` for some evaluations."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds options of the run as a whole."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder for everything that the run writes; default: runs/<config name>/<time>. Without --config, the "
            "config of an existing folder is used.",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=True,
            help="After training, test the best checkpoint (without validation the last) if there is a test split.",
        )
        if sys.argv[1] == "fit":
            parser.add_argument("--find_lr", type=bool, default=False, help=find_lr.HELP)
        parser.add_class_arguments(CheckpointOptions, "checkpoint")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, subparser in self._subcommand_parsers.items():
            subparser.usage = f"lit-llm {name} [--config FILE]... [--dotted.name VALUE]..."  # not all hundred of them
            what = COMMANDS[name][1]
            subparser.description = f"{what[0].upper()}{what[1:]}.{EXAMPLES}"
            subparser.formatter_class = ParagraphHelp

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only the requested sub-command, since each takes time to set up, without arguments that this class fixes."""
        decided, asked = {"weights_only", "verbose", "return_predictions"}, sys.argv[1]
        return {asked: LightningCLI.subcommands()[asked] | decided}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        decided = {"weights_only": True} | {
            "validate": {"verbose": False},
            "test": {"verbose": False},
            "predict": {"return_predictions": False},
        }.get(subcommand, {})
        return super()._prepare_subcommand_kwargs(subcommand) | decided

    def _parse_ckpt_path(self) -> None:
        """Does nothing: in Lightning, values stored in the checkpoint would override explicit flags."""

    def _set_seed(self) -> None:
        """Checks the trainer's options, then seeds all random number generators."""
        config = self.config[self.subcommand]
        for name in ("trainer", "checkpoint"):
            if config[name] is None:
                raise ValueError(
                    f"{name} must have options, but is null; leave the word out where none is set below it"
                )
        require_sound(vars(config["trainer"]), config.get("seed_everything"))
        streams = (config["data"].get("init_args") or {}).get("streaming")
        if streams and self.subcommand == "fit" and not config.get("find_lr"):
            require_end(vars(config["trainer"]))
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Decides on the run folder, finds the checkpoint, and sets the folder as the output of trainer and loggers."""
        config, fits = self.config[self.subcommand], self.subcommand == "fit"
        restore_nulls(config)
        if config.get("find_lr"):
            find_lr.prepare(config)
            self.save_config_callback = None  # a range test is no run to repeat
        configs = [Path(str(getattr(path, "relative", path))) for path in config.get("config") or []]
        named, asked = next(iter(configs), None), config.get("ckpt_path")
        own = run_folder.of_config(named)
        ckpt_path = asked or (None if fits or from_checkpoint.starts_from_weights(config, own) else "best")
        given = config.get("run_dir") or config["trainer"].get("default_root_dir")
        self.run_dir = run_folder.choose(self.subcommand, given, named, ckpt_path)
        starts_anew = not ckpt_path
        if ckpt_path:
            ckpt_path = asked or own_checkpoint(self.run_dir).stem
            config["ckpt_path"] = str(run_folder.find_checkpoint(self.run_dir, ckpt_path))
            checkpoint = Path(config["ckpt_path"])
            from_checkpoint.require_own_start(config["model"], self.run_dir, checkpoint, sys.argv, fits)
            starts_anew = fits and run_folder.is_of_another(self.run_dir, checkpoint)
        self.of_run = self.run_dir
        run_folder.make(self.run_dir, starts_anew, trains=fits)
        if ckpt_path and not fits:
            options = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
            checkpoint = Path(config["ckpt_path"])
            self.run_dir = run_folder.of_evaluation(self.of_run, self.subcommand, options, checkpoint)
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if self.run_dir != self.of_run and os.environ.get("LOCAL_RANK", "0") == "0":
                log.info(f"Data, options or checkpoint are not the run's own, so what is found goes to {self.run_dir}")
        config["trainer"]["default_root_dir"] = str(self.run_dir)
        log_into(config["trainer"].get("logger"), self.run_dir)

    def instantiate_classes(self) -> None:
        """Instantiates the classes; a checkpoint that is read replaces the weights that the run started from.

        So these weights, and in an evaluation the network's `path`, need not exist any more; but a tokeniser that the
        data options name must exist.
        """
        config, fits = self.config[self.subcommand], self.subcommand == "fit"
        with self._leaving_nothing():
            with from_checkpoint.completed(config, self.of_run, fits) as (checkpoint, gives_way):
                super().instantiate_classes()
            self.model.starts_from_checkpoint = gives_way
            if not fits:
                self.model.stored_size = (checkpoint.get("network") or {}).get("size")
            if self.subcommand in ("validate", "test") and hasattr(self.datamodule, "expect"):
                self.datamodule.expect(checkpoint.get(type(self.datamodule).__qualname__, {}))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with the standard parts of every run."""
        if self._get(self.config, "find_lr"):
            return super().instantiate_trainer(callbacks=[LearningRateFinder()], **kwargs)
        options = self._get(self.config_init, "trainer")
        headline = getattr(self.datamodule, "monitor", None) or getattr(self.model, "monitor", ("val/loss", "min"))
        checkpoint = self._get(self.config_init, "checkpoint").decided(headline)
        whole = standard_parts(options, checkpoint, self.run_dir, command=self.subcommand)
        return super().instantiate_trainer(**whole, **kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError) as error:
            if one_line(error):
                raise
            raise ValueError(
                f"trainer must be given what Lightning takes, but is not: {' '.join(str(error).split())}"
            ) from error

    def _run_subcommand(self, subcommand: str) -> None:
        trains = subcommand == "fit" and self.trainer.is_global_zero
        alone = locked(self.run_dir, "run_dir", "run") if trains else contextlib.nullcontext()
        try:
            with self._leaving_nothing(), alone:
                super()._run_subcommand(subcommand)
        except SystemExit:
            if self.trainer.interrupted:
                if self.trainer.is_global_zero:
                    log.info(self._stopped())
                sys.exit(130)
            raise
        finally:
            if "wandb" in sys.modules:  # its run is global: the next command of this process would log to it
                sys.modules["wandb"].finish(exit_code=int(sys.exc_info()[0] is not None))

    @contextlib.contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """Removes the run folder if an error occurs before anything is written to it."""
        try:
            yield
        except Exception:
            if self.run_dir is not None:
                run_folder.leave(self.run_dir)
            raise

    def _stopped(self) -> str:
        """The message after an interrupt, with the command that resumes a training run or repeats an evaluation."""
        of_run = ["--run_dir", str(self.run_dir)]
        if self.trainer.state.fn == "fit":
            saved = (self.run_dir / "checkpoints" / "last.ckpt").exists()
            resume = shlex.join(["lit-llm", "fit", *of_run, "--ckpt_path", "last"])
            return f"Stopped at step {self.trainer.global_step}." + f" To resume: {resume}" * saved
        again = shlex.join(["lit-llm", "test", *of_run]) if self.subcommand == "fit" else command()
        return f"Stopped before the end of {self.trainer.state.fn.value}. To start it again: {again}"

    def before_fit(self) -> None:
        """Removes empty hooks, and logs the run folder."""
        for callback in self.trainer.callbacks:
            skip_empty_hooks(callback, Callback)
        skip_empty_hooks(self.model, LightningModule)
        self._announce()

    def _announce(self) -> None:
        log.info(f"Run folder {self.run_dir}")

    def after_fit(self) -> None:
        """Tests the run's checkpoint and prints the results, or the suggestion of a learning-rate range test."""
        if self._get(self.config, "find_lr"):
            if self.trainer.is_global_zero:
                find_lr.say(self.config["fit"], self.trainer)
            return
        if self.trainer.fast_dev_run:
            return
        own = own_checkpoint(self.run_dir)
        if self._get(self.config, "test_after_fit") and own.exists() and self._has_test():
            self.trainer.test(datamodule=self.datamodule, ckpt_path=str(own), verbose=False, weights_only=True)
        if self.trainer.is_global_zero:
            self._summary()

    def after_validate(self) -> None:
        """Prints the metrics, after a check that there were batches."""
        self._require_some()
        self._print_metrics(self.trainer.callback_metrics)

    after_test = after_validate

    def after_predict(self) -> None:
        """Checks that there were batches."""
        self._require_some()

    def _require_some(self) -> None:
        """Checks that the evaluation had batches."""
        batches, split = {
            "validate": (self.trainer.num_val_batches, "validation"),
            "test": (self.trainer.num_test_batches, "test"),
            "predict": (self.trainer.num_predict_batches, "test"),
        }[self.subcommand]
        if self.trainer.is_global_zero and not sum(batches):  # with few rows, other processes may have none
            raise ValueError(
                f"data must have a {split} split for lit-llm {self.subcommand}, but have none to read; set "
                f"data.{split}_fraction"
            )

    def _print_metrics(self, metrics: dict[str, Any]) -> None:
        if self.trainer.is_global_zero:
            for name, value in metrics.items():
                print(f"{name:<23} {float(value):.4f}")

    def _has_test(self) -> bool:
        if not is_overridden("test_dataloader", self.datamodule, LightningDataModule):
            return False
        loader = self.datamodule.test_dataloader()
        return loader is not None and sized_len(loader) != 0  # `None`: a loader without a length

    @property
    def results(self) -> dict[str, Any]:
        """Content of `results.json` (see `RunReport`); empty before it is written."""
        return read_results(self.run_dir)

    def _summary(self) -> None:
        results = self.results
        self._print_metrics({name: v for name, v in results.items() if name.startswith(("val/", "test/", "seconds"))})
        print(f"{'run folder':<24}{self.run_dir}")
        if (self.run_dir / "model").is_dir():
            print(f"{'model':<24}{self.run_dir / 'model'}")


class SilentCLI(TrainingCLI):
    """A training command without printed run folder, metrics and summary, for other commands and notebooks."""

    def _announce(self) -> None:
        pass

    _summary = _announce

    def _print_metrics(self, metrics: dict[str, Any]) -> None:
        pass


class StageCLI(TrainingCLI):
    """A training that is a stage of another command."""

    def _stopped(self) -> str:
        return STOPPED


class ConfigCLI(TrainingCLI):
    """Instantiates the model and data module of a config, without run folder, trainer or run."""

    def before_instantiate_classes(self) -> None:
        """Creates no run folder."""

    def instantiate_trainer(self, **kwargs: Any) -> None:
        """Creates no trainer."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass
