"""`lit-llm compare`: compares runs; those that differ only in their seed are one setting."""

from __future__ import annotations

import argparse
import csv
import inspect
import logging
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lit_llm.cli.finished_run import NOT_OF_THE_SETTING, Finished, came_to_its_end, dotted, falls, read_run
from lit_llm.cli.parser import OneLineArguments
from lit_llm.cli.significance import paired_p
from lit_llm.data.documents import corpus_name
from lit_llm.files import read_results, replacing, write_picture, write_table

log = logging.getLogger(__name__)

TASK = (
    *("data", "data.path", "data.subset", "data.task", "data.column", "data.split_by", "data.max_documents"),
    *("data.label", "data.target"),
    *("data.validation_fraction", "data.test_fraction", "data.unanswered", "data.overlong"),
)
HIDDEN = ("model.mask_ratio", "model.whole_words", "model.mean_span")
LIMITS = ("trainer.limit_val_batches", "trainer.limit_test_batches")
OF_TOKENS = ("data.tokenizer",)
"""Options that compared runs must share: the data, what is hidden of it, how much of it is evaluated, and, for metrics
per token, the tokeniser."""

LOSSES = ("loss", "perplexity", "bits_per_byte")
"""Metrics that are the objective's loss or follow from it: they compare only runs of related objectives."""

OTHER_SEEDS = "Of a trial that has other seeds, those alone count: the seed that chose it flatters the best."

MOST_CURVES = 10
MOST_DIFFERENCES = 5
LABEL_WIDTH, LABEL_LINES = 60, 3
ROOM_FOR_LABELS = 30
"""Longest label, in characters, with which the legend still fits inside the plot."""


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    options = _parser().parse_args(words[1:])
    compare(options.runs, options.out, options.metric)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineArguments(
        prog="lit-llm compare",
        description="Compare finished runs. Runs that differ only in their seed are grouped as one setting: "
        "OUT/compare.md lists its mean and standard deviation, and a paired t-test by seed against the first setting; "
        "OUT/compare.csv lists every run; OUT/learning_curves.png plots all settings.",
        epilog="examples: lit-llm compare runs/muon/* runs/adamw/* --out reports/muon; "
        "lit-llm compare sweeps/lr --out sweeps/lr/compared",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders or sweep folders")
    parser.add_argument("--out", required=True, type=Path, help="folder for all output")
    parser.add_argument(
        "--metric",
        help="metric to compare (default: val/bits_per_byte if all runs have it, else the one that chose the best)",
    )
    return parser


@dataclass
class Group:
    """Runs of one setting, by seed."""

    runs: dict[tuple[Any, ...], Finished] = field(default_factory=dict)
    name: str = ""

    def in_order(self) -> list[tuple[tuple[Any, ...], Finished]]:
        """Pairs of seed and run, sorted by seed."""
        return sorted(self.runs.items(), key=lambda pair: [(part is not None, part) for part in pair[0]])

    def figures(self, metric: str) -> dict[tuple[Any, ...], float]:
        """The value of a metric for each seed that has it."""
        found = {seed: run.figure(metric) for seed, run in self.in_order()}
        return {seed: value for seed, value in found.items() if value is not None}


def compare(runs: list[Path], out: Path, metric: str | None = None) -> None:
    """Compares runs; arguments as in `lit-llm compare --help`.

    Raises:
        FileNotFoundError: When a folder holds no finished run.
        ValueError: When the runs are of different tasks.
    """
    folders = list(_folders(runs))
    finished = [read_run(folder) for folder in folders]
    metric = metric or _metric_of_sweeps(runs) or _shared_metric(finished)
    _require_one_task(finished, metric)
    groups = grouped(finished)
    mode = min if less_is_better(metric, finished) else max
    if len(runs) == 1 and _trials(runs[0]):
        groups.sort(key=lambda group: mean(group.figures(metric).values()) * (1 if mode is min else -1))
    out.mkdir(parents=True, exist_ok=True)
    text = table(groups, metric)
    if {one.parent for one in folders} & {folder / "seeds" for folder in runs}:
        text += f"\n{OTHER_SEEDS}\n"
    command = shlex.join(["lit-llm", "compare", *map(str, runs), "--out", str(out)])
    _write(out, groups, metric, f"{text}\nMade by `{command}`: {metric}, mean ± standard deviation over seeds.\n")
    draw_curves(out / "learning_curves.png", groups, metric)
    print(text, end="")
    for name in ("compare.md", "compare.csv", "learning_curves.png"):
        print(out / name)


def _trials(folder: Path) -> list[dict[str, str]]:
    """The ended trials of a sweep; empty for any other folder."""
    if not (folder / "trials.csv").is_file():
        return []
    with (folder / "trials.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _metric_of_sweeps(runs: list[Path]) -> str | None:
    """The metric of all given sweeps; `None` if they have different ones, or a folder is not a sweep."""
    found = {next(iter([*trials[0]][2:3]), None) if (trials := _trials(folder)) else None for folder in runs}
    return found.pop() if len(found) == 1 else None


def _folders(runs: list[Path]) -> Iterator[Path]:
    """Yields the run folders. Of a sweep: its complete trials, or, for a trial with further seeds, only those."""
    for folder in runs:
        trials = _trials(folder)
        if not trials and not (folder / "study.db").is_file():
            yield folder
            continue
        complete = [row["trial"] for row in trials if row["state"] == "complete"]
        if not complete:
            raise ValueError(f"RUN must hold trials that came to their end, but {folder} has none")
        for number in complete:
            seeds = sorted((folder / "seeds").glob(f"{int(number):03d}_seed*"))
            ended = [one for one in seeds if came_to_its_end(read_results(one))]  # the sweep may still train others
            yield from ended or [folder / "trials" / f"{int(number):03d}"]


def less_is_better(metric: str, runs: list[Finished]) -> bool:
    """Whether lower is better: by the first run's mode if it monitors the metric, else by the metric's name."""
    mode = runs[0].results.get("mode") if runs[0].results.get("monitor") == metric else None
    return mode == "min" if mode else falls(metric)


def _shared_metric(runs: list[Finished]) -> str:
    """Bits per byte, which are comparable across tokenisers, if all runs have them; else the monitored metric."""
    if all(run.figure("val/bits_per_byte") is not None for run in runs):
        return "val/bits_per_byte"
    monitors = {run.results.get("monitor", "val/loss"): run for run in runs}
    if len(monitors) > 1:
        (first, one), (second, other) = list(monitors.items())[:2]
        raise ValueError(
            f"runs must be of one task, but {one.folder} is judged by {first}, and {other.folder} by {second}; name "
            f"one that all have with --metric"
        )
    return next(iter(monitors))


def _require_one_task(runs: list[Finished], metric: str) -> None:
    loses_text = any(str(run.settings.get(name)).startswith("bert-uncased-") for run in runs for name in OF_TOKENS)
    shared = [*TASK, *HIDDEN, *LIMITS, *(() if metric.endswith("bits_per_byte") and not loses_text else OF_TOKENS)]
    shared += dict.fromkeys(name for run in runs for name in run.settings if name.startswith("data.cleaning."))
    if any(isinstance(run.settings.get(name), int) for run in runs for name in LIMITS):  # a number of batches
        shared.append("data.batch_size")
    for other in runs:
        if other.figure(metric) is None:
            known = ", ".join(sorted(n for n in other.results if n.startswith(("val/", "test/")))) or "none"
            raise ValueError(f"--metric must be one that all runs have, but {other.folder} has no {metric} ({known})")
        if metric.rpartition("/")[2] in LOSSES:
            _require_one_objective(runs[0], other)
        for name in shared:
            here, there = (_evaluated(name, run.settings.get(name)) for run in (runs[0], other))
            if here != there:
                why = ", in which their limits count," if name == "data.batch_size" else ""
                raise ValueError(
                    f"runs must be of one task, but {name}{why} is {here} in {runs[0].folder} and {there} in "
                    f"{other.folder}"
                )


def _evaluated(name: str, value: Any) -> Any:
    """What a setting means for an evaluation: a mixture of corpora counts by its sources, not by their weights."""
    if name in LIMITS:  # 1 is one batch, 1.0 is all of them
        return "all batches" if value is None or (isinstance(value, float) and value == 1) else value
    return corpus_name(value) if isinstance(value, dict) else value


def _require_one_objective(one: Finished, other: Finished) -> None:
    """Refuses to compare losses of objectives that do not extend a common concrete one."""
    paths = [run.settings.get("model") for run in (one, other)]
    if paths[0] == paths[1]:
        return
    kinds = [_concrete(path) for path in paths]
    if all(kinds) and not kinds[0] & kinds[1]:
        here, there = ((path or "nothing").rpartition(".")[2] for path in paths)
        raise ValueError(
            f"runs must be of one task, but model is a {here} in {one.folder} and a {there} in {other.folder}"
        )


def _concrete(path: str | None) -> set[type]:
    """The concrete objectives among a class and its bases; empty if the class path cannot be imported."""
    from lightning.pytorch import LightningModule

    module, _, name = (path or "").rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return set()
    if not isinstance(found, type):
        return set()
    kinds = {kind for kind in found.__mro__ if issubclass(kind, LightningModule) and not inspect.isabstract(kind)}
    return kinds - {LightningModule}


def grouped(runs: Iterable[Finished]) -> list[Group]:
    """Groups runs by setting, in order of first occurrence, and names each group by the options that differ."""
    groups: dict[str, Group] = {}
    for run in runs:
        group = groups.setdefault(run.setting, Group())
        if run.seed in group.runs:
            log.info(f"Ignoring {run.folder}: {group.runs[run.seed].folder} has the same settings and seed")
        else:
            group.runs[run.seed] = run
    found = list(groups.values())
    settings = _with_differing_classes([next(iter(group.runs.values())).settings for group in found])
    names = list(dict.fromkeys(name for each in settings for name in each))
    differ = [
        name
        for name in names
        if not name.startswith(NOT_OF_THE_SETTING) and len({str(each.get(name, "")) for each in settings}) > 1
    ]
    chosen = [name for name in differ if not _follows(name, settings)]
    for group, each in zip(found, settings, strict=True):
        own = [name for name in differ if name in each]
        if len(own) > MOST_DIFFERENCES:  # leave out options that follow from a class that is named
            own = [name for name in chosen if name in each]
        own = [f"{name.rpartition('.')[2]}={_cut(_short(each[name]))}" for name in own]
        more = "" if len(own) <= MOST_DIFFERENCES else f" and {len(own) - MOST_DIFFERENCES} more"
        group.name = " ".join(own[:MOST_DIFFERENCES]) + more or next(iter(group.runs.values())).folder.name
    for name, count in Counter(group.name for group in found).items():
        for group in found if count > 1 else ():
            if group.name == name:
                group.name += f" ({next(iter(group.runs.values())).folder})"
    return found


def _with_differing_classes(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings, with lists of classes, such as callbacks, reduced to the classes that not all settings have.

    A class is given by its name, followed by those of its options that vary.
    """
    settings = [dict(each) for each in settings]
    for name in dict.fromkeys(name for each in settings for name in each):
        lists = [each.get(name) or [] for each in settings]
        items = [item for items in lists for item in items] if all(isinstance(one, list) for one in lists) else []
        if not items or not all(isinstance(item, dict) and "class_path" in item for item in items):
            continue
        own = [[item for item in items if not all(item in others for others in lists)] for items in lists]
        for each, kept in zip(settings, own, strict=True):
            each[name] = "+".join(_apart(item, [one for items in own for one in items]) for item in kept) or "none"
    return settings


def _apart(item: dict[str, Any], all_items: list[dict[str, Any]]) -> str:
    """Name of a class, with those of its options that differ between its occurrences in `all_items`."""
    own = dict(dotted(item))
    others = [dict(dotted(one)) for one in all_items if one["class_path"] == item["class_path"]]
    varied = (option for option in own if any(one.get(option, "") != own[option] for one in others))
    options = ", ".join(f"{option.rpartition('.')[2]}={_short(own[option])}" for option in varied)
    return _short(item["class_path"]) + (f"({options})" if options else "")


def _follows(name: str, settings: list[dict[str, Any]]) -> bool:
    """Whether an option belongs to a class that varies, and its value is determined by that class."""
    parents = [name[: place.start()] for place in re.finditer(r"\.", name)]
    return any(
        len({str(each[parent]) for each in settings if parent in each}) > 1
        and len({(str(each.get(parent)), str(each.get(name, ""))) for each in settings})
        == len({str(each.get(parent)) for each in settings})
        for parent in parents
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, dict) and "class_path" in value:
        options = (f"{name}={_short(given)}" for name, given in (value.get("init_args") or {}).items())
        return f"{_short(value['class_path'])}({', '.join(options)})"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_short(given)}" for name, given in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    # A class path is shortened to the class; file names are kept.
    return re.sub(r"^(?:[a-z_]\w*\.)+(?=[A-Z]\w*$)", "", str(value))


def _cut(text: str) -> str:
    return text if len(text) <= LABEL_WIDTH else f"{text[: LABEL_WIDTH - 1]}…"


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def table(groups: list[Group], metric: str) -> str:
    """The settings as a Markdown table, with each one's mean difference from the first over the seeds of both."""
    tested = metric.replace("val/", "test/")
    columns = [metric, *([tested] if tested != metric and any(g.figures(tested) for g in groups) else []), "seconds"]
    first = groups[0].figures(metric)
    lines = [
        f"| setting | seeds | {' | '.join(columns)} | against the first | p, paired by seed |",
        f"| --- | ---: |{' ---: |' * len(columns)} ---: | ---: |",
    ]
    for group in groups:
        own = group.figures(metric)
        seeds = [seed for seed in own if seed in first] if group is not groups[0] else []
        p = paired_p([own[seed] for seed in seeds], [first[seed] for seed in seeds])
        away = f"{mean(own[seed] - first[seed] for seed in seeds):+.4f}" if seeds else "–"
        name = group.name.replace("|", "\\|")
        cells = [_spread(list(group.figures(column).values())) for column in columns[:-1]]
        cells.append(f"{mean(group.figures('seconds').values()):.0f}" if group.figures("seconds") else "–")
        test = "–" if p is None else f"{p:.2g}"
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} | {away} | {test} |")
    return "\n".join(lines) + "\n"


def _write(out: Path, groups: list[Group], metric: str, text: str) -> None:
    with replacing(out / "compare.md") as new:
        new.write_text(text, encoding="utf-8")
    runs = [(group.name, run) for group in groups for _, run in group.in_order()]
    names = {name for _, run in runs for name, value in run.results.items() if type(value) in (int, float)}
    columns = sorted(names)
    rows = (
        [name, *run.seed, run.folder, run.figure(metric), *(run.results.get(column) for column in columns)]
        for name, run in runs
    )
    write_table(out / "compare.csv", ["setting", "seed", "data.seed", "run", f"compared {metric}", *columns], rows)


def curves(group: Group, metric: str) -> list[tuple[int, float, float]]:
    """For each step: step, mean and standard deviation over the seeds that have the metric at that step."""
    from lit_llm.callbacks.metrics_csv import read_metrics

    found: dict[int, list[float]] = {}
    for run in group.runs.values():
        for row in read_metrics(run.folder / "metrics.csv"):
            if metric in row:
                found.setdefault(row["step"], []).append(row[metric])
    return [(step, mean(v), stdev(v) if len(v) > 1 else 0.0) for step, v in sorted(found.items())]


def draw_curves(path: Path, groups: list[Group], metric: str) -> None:
    """Plots each setting's mean by step with a band of ± one standard deviation; at most the first ten settings."""
    from matplotlib.figure import Figure

    if len(groups) > MOST_CURVES:
        log.info(f"The picture shows the first {MOST_CURVES} of {len(groups)} settings")
    shown = groups[:MOST_CURVES]
    beside = len(shown) > 4 or max(len(group.name) for group in shown) > ROOM_FOR_LABELS
    figure = Figure(figsize=(11 if beside else 8, 4.5), layout="constrained")
    axes = figure.subplots()
    for group in shown:
        points = curves(group, metric)
        if not points:
            continue
        steps, means, spreads = zip(*points, strict=True)
        [line] = axes.plot(steps, means, marker="o", markersize=3, label=_label(group))
        low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel=metric)
    axes.grid(alpha=0.3)
    if axes.lines:
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if beside else {"loc": "best"}
        legend = axes.legend(fontsize=8, title="setting (seeds)", **place)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a path may have two $
    write_picture(path, figure)


def _label(group: Group) -> str:
    """Legend label of a setting: its name, wrapped and cut to a few lines, and its number of seeds."""
    lines = textwrap.wrap(group.name, LABEL_WIDTH, max_lines=LABEL_LINES, placeholder=" …")
    return "\n".join(lines) + f" ({len(group.runs)})"
