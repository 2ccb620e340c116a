"""The output of a run: results, a plot of the learning curve, a model directory."""

from __future__ import annotations

import copy
import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

import lit_llm
from lit_llm.callbacks.best_checkpoint import keeps_best, rank
from lit_llm.callbacks.last_checkpoint import ends_last_epoch
from lit_llm.callbacks.metrics_csv import MetricsCSV, read_metrics
from lit_llm.callbacks.throughput import Throughput
from lit_llm.checkpoint_files import own_checkpoint
from lit_llm.checkpoints import finish, read_adapted, save_model
from lit_llm.compression.compression import is_reformed, records_of
from lit_llm.files import read_results, replacing, write_json, write_picture
from lit_llm.shards import is_shared_out

log = logging.getLogger(__name__)


class RunReport(Callback):
    """Writes `results.json`, `learning_curve.png` and `model/` into the run folder.

    `results.json` holds the metrics of the last validation (`val/…`), of the best one (`best/val/…`, `best/step`) and
    of the test (`test/…`), the criterion for the best (`monitor`, `mode`), whether the run is `finished` (false if it
    was interrupted), its cost (`step`, `tokens`, `seconds` of training) and its origin (`commit`, `command`). `model/`
    holds the weights of the best validation.

    Args:
        monitor: Metric that decides which validation is best.
        mode: Whether `min` or `max` of the metric is best.
    """

    def __init__(self, monitor: str = "val/loss", mode: str = "min") -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"checkpoint.mode must be min or max, but is {mode!r}")
        self.monitor, self.mode = monitor, mode
        self.results: dict[str, Any] = {}
        self._began, self._stepped = 0, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes that no step is taken yet: until one is, the files in the folder are those of the previous command."""
        self._stepped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the best validation of another folder, whose `best.ckpt` is not here."""
        if not keeps_best(trainer, Path(trainer.default_root_dir) / "checkpoints"):
            self.results = {name: v for name, v in self.results.items() if not name.startswith("best/")}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the step at which training starts or resumes."""
        self._began = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.begin(self._began)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Requests a validation after the last step of `max_steps` or `max_epochs`, whatever the interval.

        At the first step, marks a run that had finished as unfinished, in case it is killed.
        """
        if not self._stepped and trainer.global_step > self._began:
            self._stepped = True
            if trainer.is_global_zero and self._read(trainer).get("finished"):
                self._merge(trainer, {"finished": False})
        if trainer.global_step == trainer.max_steps or ends_last_epoch(trainer):
            trainer.should_stop = True
            if trainer.check_val_every_n_epoch is not None:  # this may be an epoch without a validation
                trainer.check_val_every_n_epoch = 1

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the metrics."""
        if trainer.state.fn == "validate":
            self._add(trainer, "val/")
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        found = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if self.monitor not in found:
            known = ", ".join(sorted(found)) or "none"
            raise ValueError(f"checkpoint.monitor must be a metric of the validation ({known}), but is {self.monitor}")
        best = {name.removeprefix("best/"): v for name, v in self.results.items() if name.startswith("best/")}
        now, before = (rank(metrics, self.monitor, self.mode) for metrics in (found, best))
        if self.monitor not in best or now < before:
            self.results |= {f"best/{k}": v for k, v in found.items()} | {"best/step": trainer.global_step}
        self.results |= found

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the report and exports the model of the best checkpoint.

        Without a best checkpoint, exports the network in memory, or, if the weights are sharded, the last checkpoint.
        """
        if trainer.fast_dev_run:
            return
        self._write(trainer, finished=True)
        self._export(trainer, pl_module)

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the report so far if a run fails or is interrupted after its first step; before, changes nothing."""
        if trainer.state.fn == "fit" and self._stepped and not trainer.fast_dev_run:
            self._write(trainer, finished=False)

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the test's metrics."""
        self._add(trainer, "test/")

    def _add(self, trainer: Trainer, split: str) -> None:
        """Adds the metrics of an evaluation to `results.json`; without a training run's report, also their origin.

        In a training run's report, metrics on rows that may have been trained on do not replace its own.
        """
        found = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith(split)}
        if "monitor" not in self._read(trainer):
            self._merge(trainer, {**found, "commit": commit(), "command": command()})
        elif split == "test/" and not getattr(trainer.datamodule, "doubt", None):  # validations are reported already
            self._merge(trainer, found)

    def _write(self, trainer: Trainer, finished: bool) -> None:
        for logger in trainer.loggers:
            logger.save()
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)
        judged = {"monitor": self.monitor, "mode": self.mode, "finished": finished}
        took = throughput.state_dict() if throughput else {}
        cost = {"tokens": took["tokens"], "seconds": round(took["seconds"], 2)} if took else {}
        made = {"step": trainer.global_step, **cost, "commit": commit(), "command": command()}
        kept = {name: value for name, value in self._read(trainer).items() if not name.startswith("test/")}
        folder = Path(trainer.default_root_dir)
        write_json(folder / "results.json", kept | self.results | judged | made)  # test metrics are of earlier weights
        draw_learning_curve(folder, self.monitor, self.mode)

    def _merge(self, trainer: Trainer, news: dict[str, Any]) -> None:
        write_json(Path(trainer.default_root_dir) / "results.json", self._read(trainer) | news)

    def _read(self, trainer: Trainer) -> dict[str, Any]:
        return read_results(Path(trainer.default_root_dir))

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        own = own_checkpoint(folder)
        adaptation = getattr(pl_module, "adaptation", None)
        shared_out = is_shared_out(pl_module.parameters())
        if own.exists() and (shared_out or own.stem == "best"):
            network, _ = read_adapted(own)
        elif shared_out:
            log.info("No model directory: the weights are sharded over devices, and there is no checkpoint")
            return
        else:
            changes = adaptation is not None or records_of(pl_module.evaluated)
            network = copy.deepcopy(pl_module.evaluated) if changes else pl_module.evaluated
            if changes:  # the average requires no gradients, which tell adapter weights apart
                for mine, theirs in zip(network.parameters(), pl_module.network.parameters(), strict=True):
                    mine.requires_grad_(theirs.requires_grad)
        if adaptation is not None and adaptation.adds:
            with replacing(folder / "adapter") as new:
                new.mkdir()
                adaptation.save(network, new)
        finish(network, adaptation)
        if not hasattr(network, "to_hf_config"):
            log.info(f"No model directory: transformers has no class for a {type(network).__name__}")
            return
        results = read_results(folder)
        is_best = own.stem == "best" and own.exists() and "best/step" in results
        card = model_card(folder.parent.name, network, trainer.datamodule, results, "best/" if is_best else "")
        data = trainer.datamodule
        processor, tokenizer = (getattr(data, name, None) for name in ("image_processor", "tokenizer"))
        if tokenizer is not None and (longest := getattr(data, "max_seq_len", None)):
            tokenizer.model_max_length = longest  # texts are later truncated as in training
        save_model(folder / "model", network, tokenizer, card, processor)

    def state_dict(self) -> dict[str, Any]:
        """The metrics so far, so that the best of a resumed run covers all of it."""
        return {"results": self.results}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the metrics so far."""
        self.results = state_dict["results"]


def commit() -> str | None:
    """The commit of this package's source, marked if files differ from it; `None` outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(lit_llm.__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails if installed inside another repository
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


OURS = ("lit-llm", "__main__.py", "ipykernel_launcher.py")
"""Program names whose arguments are those of `lit-llm`: the shell command, `python -m lit_llm`, a notebook kernel."""


def command() -> str:
    """The command line that started this process, or its equivalent in a notebook."""
    name = "lit-llm" if Path(sys.argv[0]).name in OURS else sys.argv[0]
    return shlex.join([name, *sys.argv[1:]])


def known_to_transformers(network: Any) -> bool:
    """Whether transformers has the class that a network is exported as."""
    import transformers

    return hasattr(transformers, network.to_hf_config()["architectures"][0])


def model_card(name: str, network: Any, data: Any, results: dict[str, Any], prefix: str = "") -> str:
    """Model card in Markdown: the network, the command, the metrics and the data.

    Args:
        name: Title of the card.
        network: The network that the card is about.
        data: The data module that it was trained with.
        results: Content of `results.json`.
        prefix: What the metrics of these weights begin with: `best/`, or nothing for those of the last step.
    """
    metrics = f"{prefix}val/"
    figures = {k.removeprefix(prefix): v for k, v in results.items() if isinstance(v, float) and k.startswith(metrics)}
    manifest = {k: v for k, v in getattr(data, "manifest", {}).items() if k != "files"}
    parameters, reformed = sum(p.numel() for p in network.parameters()), is_reformed(network)
    known = not reformed and known_to_transformers(network)
    return "\n".join(
        [
            "---",
            *(["library_name: transformers"] * known),
            "tags: [lit-llm]",
            "---",
            f"# {name}",
            "",
            f"A {type(network).__name__} of {parameters:,} parameters, trained by lit-llm {lit_llm.__version__} "
            f"(commit {results.get('commit')}) with",
            "",
            f"    {results.get('command')}",
            "",
            f"for {results.get('step'):,} steps over {results.get('tokens', 0):,} tokens in "
            f"{results.get('seconds', 0):,.0f} s.",
            "",
            *(["Compressed as in `compression.json`; lit-llm reads it, transformers does not.", ""] * reformed),
            *(["Transformers has no such network; lit-llm reads it.", ""] * (not known and not reformed)),
            f"| metric, at step {results.get(f'{prefix}step'):,} | value |",
            "| --- | ---: |",
            *(f"| {k} | {v:.4f} |" for k, v in sorted(figures.items())),
            "",
            "## Data",
            "",
            "```json",
            json.dumps(manifest, indent=2),
            "```",
            "",
        ]
    )


def draw_learning_curve(folder: Path, monitor: str = "val/loss", mode: str = "min") -> None:
    """Draws `learning_curve.png` from `metrics.csv`: both losses, and the headline metric with its best value."""
    rows = read_metrics(folder / "metrics.csv")
    if not rows:
        return
    from matplotlib.figure import Figure

    headline = "val/bits_per_byte" if any("val/bits_per_byte" in row for row in rows) else monitor
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, axes, style in (
        ("train/loss", left, {"color": "tab:gray", "linewidth": 1}),
        ("val/loss", left, {"color": "tab:blue", "marker": "o", "markersize": 4}),
        (headline, right, {"color": "tab:green", "marker": "o", "markersize": 4}),
    ):
        points = [row for row in rows if name in row]
        if points:
            axes.plot([row["step"] for row in points], [row[name] for row in points], label=name, **style)
            axes.set_xlabel("step")
            axes.legend()
            axes.grid(alpha=0.3)
            if axes is right:
                best = min(points, key=lambda row: rank(row, headline, mode if headline == monitor else "min"))
                axes.plot(best["step"], best[name], marker="*", markersize=11, color="tab:green")
                axes.set_title(f"{name}: {best[name]:.4f} at step {best['step']}")
    write_picture(folder / "learning_curve.png", figure)
