"""`lit-llm compress`: compresses a model in stages; each is evaluated, and finished ones are not repeated."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from lit_llm.cli.chain_file import Chain, Stage, read_chain
from lit_llm.cli.chain_folder import claim
from lit_llm.cli.finished_run import falls
from lit_llm.cli.parser import OneLineArguments
from lit_llm.files import locked, replacing, write_json, write_picture

if TYPE_CHECKING:
    from lit_llm.compression.compression import Compression

log = logging.getLogger(__name__)


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    options, more = _parser().parse_known_args(words[1:])
    with locked(options.out, "--out", "chain"):
        compress(options.config, options.model, options.out, more)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineArguments(
        prog="lit-llm compress",
        description="Make a trained model smaller and faster through a chain of stages: compression methods and "
        "training runs (to distil or to recover). Each stage is measured; one that loses too much ends the chain, and "
        "the last good stage is the result, in OUT/model. An interrupted command resumes where it stopped, and so "
        "does a chain that was extended with more stages or given a different floor. All other options, such as "
        "--data.path, are passed to every training and evaluation.",
        epilog="example: lit-llm compress --config configs/compression/chain_llama.yaml "
        "--model runs/llama_stdlib/<time>/model --out runs/llama_small",
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file of the chain")
    parser.add_argument("--model", required=True, help="a model directory or a run folder")
    parser.add_argument("--out", required=True, type=Path, help="folder for all output")
    return parser


def compress(config: Path, model: str, out: Path, more: list[str]) -> None:
    """Runs a chain; arguments as in `lit-llm compress --help`.

    Raises:
        ValueError: When `out` is of another chain, or a stage cannot be applied to its network; the report on the
            stages before it is written first.
    """
    from lit_llm.callbacks.run_report import command
    from lit_llm.checkpoints import read_model
    from lit_llm.compression.compression import records_of

    done_by, chain = command(), read_chain(config)
    methods, folder = _methods(chain), out / "stages"
    original = read_model(model)
    if original.folder is None:
        raise ValueError(f"--model must be a model directory or a run folder with one, but is {model}")
    if before := records_of(original.network):
        names = ", ".join(record["class_path"].rpartition(".")[2] for record in before)
        log.info(f"{model} has already been compressed, by {names}; scores are relative to that")
    if methods[0] is not None:
        methods[0].chosen(original.network)
    claim(out, chain, model, original.folder, more)
    chief = _Evaluator(chain, folder, original.folder, more)
    if chain.metric is not None:
        chief.try_metric(original.folder)
    rows = [chief.measured("00-original", original.folder, time.perf_counter()) | {"model": str(original.folder)}]
    previous, stopped, failed = original.folder, None, None
    for number, (stage, method) in enumerate(zip(chain.stages, methods), 1):
        place, started = folder / f"{number:02d}-{stage.name}", time.perf_counter()
        made = place / "model"
        try:
            if method is None:
                _fit(stage, place, {"previous": str(previous), "original": str(original.folder)}, more)
            elif not (made / "config.json").is_file():
                _apply(stage.name, method, previous, made, chief)
        except ValueError as error:
            if number == 1:
                raise
            failed, stopped = error, f"{stage.name} cannot be made: the chain ends with {rows[-1]['name']}"
            break
        rows.append(chief.measured(place.name, made, started))
        if not _is_enough(rows[0], rows[-1], stage.floor):
            rows[-1]["kept"] = False
            stopped = (
                f"{stage.name} leaves {rows[-1]['metric']:.4f} of {rows[0]['metric']:.4f} in {rows[0]['metric_name']}, "
                f"which crosses its floor of {stage.floor:g}: the chain ends with {rows[-2]['name']}"
            )
            log.info(stopped)
            break
        previous = made
    chief.time(rows)
    _report(out, rows, {"command": done_by, "stopped": stopped, "model": model, "repeats": chain.repeats})
    with replacing(out / "model") as new:
        shutil.copytree(previous, new)
    print((out / "report.md").read_text())
    print(f"{'model':<22}{out / 'model'}")
    if failed is not None:
        raise failed


def _methods(chain: Chain) -> list[Compression | None]:
    """The stages' methods, `None` for a training run; instantiated before any work, so that mistakes show at once."""
    made = [None if stage.method is None else _made(stage.method) for stage in chain.stages]
    for method in made:
        if method is not None and method.needs_batches and not chain.calibration_batches:
            raise ValueError(f"calibration_batches must be at least 1 for {type(method).__name__}, but is 0")
    return made


def _made(method: dict[str, Any]) -> Compression:
    from jsonargparse import ArgumentParser

    from lit_llm.cli.errors import parser_line
    from lit_llm.compression.compression import method_of

    kind, given = method_of(method), method.get("init_args") or {}
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise ValueError(f"class_path must be a whole method, but {method['class_path']} does not write {missing[0]}")
    parser, kinds = ArgumentParser(exit_on_error=False), get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in names:  # one by one, as jsonargparse does not find the types that a subclass inherits
        parser.add_argument(f"--{name}", type=kinds[name])
    try:
        values = parser.parse_object(given)
    except Exception as error:
        line = f"{parser_line(str(error), names)} (init_args of {method['class_path']})"
        raise ValueError(line) from error
    try:
        return kind(**{name: values[name] for name in given})
    except TypeError as error:
        raise ValueError(f"init_args must be those of {method['class_path']}, but are not: {error}") from error


def _apply(name: str, method: Compression, source: Path, target: Path, chief: _Evaluator) -> None:
    from lit_llm.checkpoints import read_image_processor, read_model, save_model

    model = read_model(source)
    batches = chief.calibration() if method.needs_batches else []
    started = time.perf_counter()
    record = method.apply(model.network, batches)
    log.info(f"{name}: {type(method).__name__} took {time.perf_counter() - started:.1f} s")
    said = json.dumps({key: value for key, value in record.items() if key != "form"}, indent=2)
    card = f"# {name}\n\n{source}, compressed by lit-llm:\n\n```json\n{said}\n```\n"
    save_model(target, model.network, model.tokenizer, card, read_image_processor(source))


def _fit(stage: Stage, folder: Path, places: dict[str, str], more: list[str]) -> None:
    """Trains, or resumes training, in the stage's run folder."""
    if (folder / "done.json").is_file():
        return
    words = [word for file in stage.fit for word in ("--config", file)]
    for name, value in stage.options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        for key, place in places.items():
            text = text.replace(f"{{{key}}}", place)
        words.append(f"--{name}={text}")
    words += [*more, "--run_dir", str(folder), "--test_after_fit", "false"]
    if (folder / "checkpoints" / "last.ckpt").is_file():
        words += ["--ckpt_path", "last"]
    _command("fit", words)
    if not (folder / "model" / "config.json").is_file():
        raise ValueError(f"stage {stage.name} must leave a model directory, but {folder} has none")
    write_json(folder / "done.json", {"done": True})


def _command(name: str, words: list[str]) -> Any:
    """Runs a training command in this process and returns its LightningCLI."""
    from lit_llm.cli import training

    before = list(sys.argv)
    try:
        return training.run_stage([name, *words])
    finally:
        sys.argv = before


class _Evaluator:
    """Evaluates the stages of a chain; results are stored in the stages' folders."""

    def __init__(self, chain: Chain, folder: Path, original: Path, more: list[str]) -> None:
        self.chain, self.folder, self.original, self.more = chain, folder, original, more
        self._cli: Any = None

    def _evaluate(self, model: Path, place: Path, *flags: str) -> Any:
        words = [word for file in self.chain.evaluate for word in ("--config", file)]
        words += [*self.more, "--model.network=null", f"--model.weights={model}", "--run_dir", str(place), *flags]
        self._cli = _command(self.chain.split, words)
        return self._cli

    def try_metric(self, model: Path) -> None:
        """Evaluates one batch to check that the chain's metric is logged.

        Raises:
            ValueError: When it is not.
        """
        first = self.folder / "00-original"
        if not (first / "measured.json").is_file():
            limit = "val" if self.chain.split == "validate" else "test"
            with contextlib.redirect_stdout(io.StringIO()):  # figures of one batch are no result
                cli = self._evaluate(model, first / "evaluation", f"--trainer.limit_{limit}_batches=1")
            self._headline(dict.fromkeys(cli.trainer.callback_metrics, 0.0))

    def measured(self, name: str, model: Path, started: float) -> dict[str, Any]:
        """A stage's row of the report, without its speed; `started` is the `perf_counter` at the stage's start."""
        from lit_llm.checkpoints import load_model
        from lit_llm.compression.report import count_nonzero, count_parameters, peak_memory, rows_of
        from lit_llm.weights import bytes_on_disk

        file = self.folder / name / "measured.json"
        if file.is_file():
            return json.loads(file.read_text()) | {"model": str(model)}  # which may have been moved
        cli = self._evaluate(model, self.folder / name / "evaluation")
        found = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
        metric, mode = self._headline(found)
        network = load_model(model)[0]
        batch = next(iter(self._loader()))
        row = {
            "name": name.partition("-")[2],
            "metric": found[metric],
            "metric_name": metric,
            "mode": mode,
            "parameters": count_parameters(network),
            "nonzero": count_nonzero(network),
            "bytes": bytes_on_disk(model),
            "peak_memory": peak_memory(network, rows_of(batch, 32)),
            "metrics": found,
            "seconds": round(time.perf_counter() - started, 1),
            "model": str(model),
            "kept": True,
        }
        write_json(file, row)
        return row

    def _headline(self, found: dict[str, float]) -> tuple[str, str]:
        headline = getattr(self._cli.datamodule, "monitor", None) or self._cli.model.monitor
        prefix = "val" if self.chain.split == "validate" else "test"
        chief = headline[0].rpartition("/")[2]
        last = (self.chain.metric or chief).rpartition("/")[2]
        name = f"{prefix}/{last}"
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise ValueError(f"metric must be one that is measured ({known}), but is {name}")
        return name, headline[1] if last == chief else "min" if falls(name) else "max"

    def _ready(self) -> Any:
        if self._cli is None:  # all stages were evaluated before: run one evaluation to get the data
            self._evaluate(self.original, self.folder / "00-original" / "evaluation")
        return self._cli.datamodule

    def _loader(self) -> Any:
        data = self._ready()
        return data.val_dataloader() if self.chain.split == "validate" else data.test_dataloader()

    def calibration(self) -> list[Any]:
        """The first batches of the first training epoch."""
        return list(islice(iter(self._ready().train_dataloader()), self.chain.calibration_batches))

    def time(self, rows: list[dict[str, Any]]) -> None:
        """Adds the speed of all stages, timed in turns."""
        from lit_llm.checkpoints import load_model
        from lit_llm.compression.report import speeds

        networks = {row["name"]: load_model(row["model"])[0] for row in rows}
        batch = next(iter(self._loader()))
        for name, found in speeds(networks, batch, self.chain.repeats, self.chain.compiled).items():
            next(row for row in rows if row["name"] == name).update(found)


def _is_enough(first: dict[str, Any], row: dict[str, Any], floor: float) -> bool:
    if not floor:
        return True
    if first["mode"] == "max":
        return row["metric"] >= floor * first["metric"]
    return row["metric"] <= first["metric"] / floor


def _report(out: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Writes `report.json`, `report.md` and `pareto.png`."""
    import torch

    from lit_llm.callbacks.run_report import commit

    about |= {"commit": commit(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(out / "report.json", {**about, "stages": rows})
    first = rows[0]
    columns = ["stage", first["metric_name"], "parameters", "non-zero", "bytes", "smaller", "peak memory"]
    columns += ["ms p50 / p95", "ms p50 / p95, 32 rows", "rows/s"]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for row in rows:
        cells = [
            row["name"] + ("" if row["kept"] else " (not kept)"),
            f"{row['metric']:.4f}",
            f"{row['parameters']:,}",
            f"{row['nonzero']:,}",
            f"{row['bytes']:,}",
            f"{first['bytes'] / row['bytes']:.2f} ×",
            f"{row['peak_memory']:,}",
            f"{row['latency_ms_p50']:.2f} / {row['latency_ms_p95']:.2f}",
            f"{row['latency_ms_p50_b32']:.2f} / {row['latency_ms_p95_b32']:.2f}",
            f"{row['throughput']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    timed = (
        f"p50 and p95 are the median and the 95th percentile of {about['repeats']} answers; rows/s are of the median."
    )
    stopped = [about["stopped"] + ".", ""] if about["stopped"] else []
    text = "\n".join([f"    {about['command']}", "", *lines, "", timed, "", *stopped])
    (out / "report.md").write_text(text, encoding="utf-8")
    _draw(out / "pareto.png", rows)


def _draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plots quality against size and against time, with a line through the Pareto front."""
    from matplotlib.figure import Figure

    sign = 1 if rows[0]["mode"] == "max" else -1
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(1, 2), (("bytes", "bytes on disk"), ("latency_ms_p50_b32", "ms for 32 rows")), strict=True
    ):
        best = [
            row
            for row in rows
            if not any(o[key] <= row[key] and sign * o["metric"] > sign * row["metric"] for o in rows)
        ]
        best.sort(key=lambda row: row[key])
        axes.plot([row[key] for row in best], [row["metric"] for row in best], color="tab:gray", linewidth=1)
        for row in rows:
            axes.plot(row[key], row["metric"], "o" if row["kept"] else "x", color="tab:blue")
            place = {"xytext": (4, 4), "textcoords": "offset points"}
            axes.annotate(row["name"], (row[key], row["metric"]), fontsize=8, parse_math=False, **place)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel(rows[0]["metric_name"])
        axes.grid(alpha=0.3)
    write_picture(path, figure)
