"""`lit-llm sweep`: runs a W&B sweep file on this machine, without a W&B account."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from lit_llm.cli.finished_run import read_run
from lit_llm.cli.parser import OneLineArguments
from lit_llm.cli.significance import verdict
from lit_llm.cli.sweep_file import Sweep, read_sweep, written
from lit_llm.cli.sweep_options import require_options
from lit_llm.cli.sweep_parameters import Constant, label
from lit_llm.cli.sweep_pictures import draw
from lit_llm.cli.sweep_progress import SweepProgress
from lit_llm.cli.sweep_study import open_study
from lit_llm.cli.trial_run import INTERRUPTED, TrialRun, figure_of, metrics_of
from lit_llm.files import locked, replacing, write_table
from lit_llm.ranges import require_at_least
from lit_llm.wording import did_you_mean, needing

log = logging.getLogger(__name__)

SEED = 1337
SECONDS_BETWEEN_LOOKS = 0.2


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    options, more = _parser().parse_known_args(words[1:])
    sweep(options.config, options.trials, options.out, options.workers, options.seeds, more)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineArguments(
        prog="lit-llm sweep",
        description="Run a Weights & Biases sweep file on this machine; `wandb sweep` and `wandb agent` accept the "
        "same file. Each trial is a run folder, OUT/trials/<number>. The same command resumes an interrupted sweep, "
        "and extends a finished one with more --trials. All other options, such as --data.path, are passed to each "
        "trial.",
        epilog="example: lit-llm sweep --config configs/sweeps/llama_stdlib_lr.yaml --trials 20 --out sweeps/lr",
    )
    parser.add_argument("--config", required=True, type=Path, help="the sweep file")
    parser.add_argument("--trials", type=int, help="total trials (default: the file's run_cap, or the whole grid)")
    parser.add_argument("--out", required=True, type=Path, help="folder for all output")
    parser.add_argument("--workers", type=int, default=1, help="parallel trials, which share the cores (default 1)")
    parser.add_argument(
        "--seeds",
        type=int,
        default=0,
        help="at the end, train the best trial and the runner-up with this many more seeds to compare them (default 0)",
    )
    return parser


def sweep(config: Path, trials: int | None, out: Path, workers: int, seeds: int, more: list[str]) -> None:
    """Runs or resumes a sweep; arguments as in `lit-llm sweep --help`.

    Raises:
        ValueError: When the file or an option is invalid, no run logs the metric, or no trial finishes.
    """
    plan = read_sweep(config)
    size = sum(1 for _ in plan.grid()) if plan.method == "grid" else None
    trials = trials if trials is not None else plan.run_cap or size
    if trials is None:
        raise ValueError(f"--trials must be given where {config} has no run_cap, but is not")
    require_at_least(1, "--", trials=trials)
    require_at_least(1, "--", workers=workers)
    if seeds < 0 or seeds == 1:
        raise ValueError(f"--seeds must be 0, or at least 2 to show what a seed does, but is {seeds}")
    with needing("optuna", "sweep", "for a sweep"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    require_options(plan, more)
    with locked(out, "--out", "sweep"):
        study = open_study(plan, out, more)
        searched = _Search(plan, study, out, more, workers)
        searched.go_on(min(trials, size) if size else trials)
        searched.report()
        searched.say_whether_seeds_matter(seeds)


class _Search:
    """A study and its running trials."""

    def __init__(self, plan: Sweep, study: Any, out: Path, more: list[str], workers: int) -> None:
        self.plan, self.study, self.out, self.more, self.workers = plan, study, out, more, workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = max(1, cores // workers)
        self.running: dict[int, tuple[Any, TrialRun]] = {}
        self.progress = SweepProgress(plan.metric, 0)

    def trials(self, *states: str) -> list[Any]:
        """The trials in any of these states, by number; all trials if no state is given."""
        return [t for t in self.study.get_trials(deepcopy=False) if not states or t.state.name in states]

    def folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.out / "trials" / f"{number:03d}"

    # Searching.

    def go_on(self, number: int) -> None:
        """Resumes interrupted trials and starts new ones until there are `number` trials or the target is reached."""
        from optuna.trial import Trial, TrialState

        if self.plan.method == "grid":
            number = self._queue_the_grid(number)
        cut = []
        for trial in (Trial(self.study, trial._trial_id) for trial in self.trials("RUNNING")):
            if "stopped" in trial.user_attrs:  # it was being pruned when the sweep ended
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                cut.append(trial)
        ended = len(self.trials("COMPLETE", "PRUNED", "FAIL"))
        try:
            with SweepProgress(self.plan.metric, max(number, self._begun()), ended) as self.progress:
                while True:
                    while len(self.running) < self.workers and (
                        cut or (self._begun() < number and not self._reached())
                    ):
                        self._start(cut.pop(0) if cut else self._next())
                    if not self.running:
                        if self._begun() < number:
                            self.progress.say(f"{self.plan.metric} has reached its target of {self.plan.target}")
                        return
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    for trial, process in list(self.running.values()):
                        self._look_at(trial, process)
                    self.progress.look()
        except BaseException:
            for trial, process in self.running.values():
                if "stopped" not in trial.user_attrs:  # else already interrupted: a second signal prevents the save
                    process.interrupt()
            for _, process in self.running.values():
                process.wait()
            raise

    def _reached(self) -> bool:
        """Whether the best trial has reached the target of the sweep file."""
        best, target = self._best(), self.plan.target
        return (
            bool(best) and target is not None and (best[0].value - target) * (1 if self.plan.mode == "max" else -1) >= 0
        )

    def _begun(self) -> int:
        return len(self.trials()) - len(self.trials("WAITING"))

    def _drawn(self) -> set[str]:
        """The keys of parameters that are not constant."""
        return {parameter.key for parameter in self.plan.parameters if not isinstance(parameter, Constant)}

    def _queue_the_grid(self, number: int) -> int:
        """Queues points of the grid that have no trial, until `number` points have one.

        Returns:
            The number of trials in all, including those that are not on the grid or repeat a point.
        """
        drawn, others = self._drawn(), 0

        def labels(settings: dict[str, Any]) -> dict[str, Any]:
            return {key: label(value) for key, value in settings.items() if key in drawn}

        points = [labels(point) for point in self.plan.grid()]
        left = list(points)
        for trial in self.trials():  # another method may have drawn some of the points, some of them twice
            point = labels(trial.user_attrs.get("settings") or trial.system_attrs.get("fixed_params", {}))
            if point in left:
                left.remove(point)
            else:
                others += 1
        for point in left[: max(0, number - len(points) + len(left))]:
            self.study.enqueue_trial(point)
        return number + others

    def _next(self) -> Any:
        """A new trial. Its number seeds the sampler, so that a resumed sweep does not repeat its first draws."""
        import optuna

        seed = SEED + len(self.trials())
        if self.plan.method == "bayes":
            self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.workers > 1)
        else:
            self.study.sampler = optuna.samplers.RandomSampler(seed=seed)
        return self.study.ask()

    def _start(self, trial: Any) -> None:
        settings = {parameter.key: parameter.suggest(trial) for parameter in self.plan.parameters}
        trial.set_user_attr("settings", settings)
        words = [*self.plan.words(settings), *self.more]
        process = TrialRun(words, self.folder(trial.number), self.threads)
        self.running[trial.number] = trial, process
        self.progress.begin(f"trial {trial.number}", process)

    def _look_at(self, trial: Any, process: TrialRun) -> None:
        """Reports a trial's new metric values to the study, interrupts it if it is pruned, and records its end."""
        from lit_llm.callbacks.metrics_csv import read_metrics

        ended, kind = process.exit_code, trial.study.get_trials(deepcopy=False)[trial.number].user_attrs.get("stopped")
        if kind is None and self.plan.early_terminate:
            rows = read_metrics(process.folder / "metrics.csv")
            for count, value in enumerate((row[self.plan.metric] for row in rows if self.plan.metric in row), 1):
                if count not in trial.storage.get_trial(trial._trial_id).intermediate_values:
                    trial.report(value, count)
                    if ended is None and trial.should_prune():
                        trial.set_user_attr("stopped", count)
                        process.interrupt()
                        return
        if ended is not None:
            del self.running[trial.number]
            self.progress.end(f"trial {trial.number}")
            # (A trial that finished before the interrupt reached it counts as complete.)
            self._finish(trial, process, stopped=kind is not None and ended != 0)

    def _finish(self, trial: Any, process: TrialRun, stopped: bool) -> None:
        from optuna.trial import TrialState

        value = figure_of(process.folder, self.plan.metric)
        if process.exit_code == INTERRUPTED and not stopped:
            self.progress.say(f"trial {trial.number} was interrupted: run the same command again to resume it", "red")
            return
        if stopped:
            self.study.tell(trial, state=TrialState.PRUNED)
        elif process.exit_code:
            trial.set_user_attr("error", process.last_line())
            self.study.tell(trial, state=TrialState.FAIL)
        elif value is not None and not math.isfinite(value):
            trial.set_user_attr("error", f"{self.plan.metric} must be a number, but is {value}")
            self.study.tell(trial, state=TrialState.FAIL)
        elif value is None:
            known = metrics_of(process.folder)
            raise ValueError(
                f"metric.name of {self.plan.path} must be one that its runs log ({', '.join(known)}), but is "
                f"{self.plan.metric}{did_you_mean(self.plan.metric, known)}"
            )
        else:
            self.study.tell(trial, value)
        self._say(trial.number, process.seconds)
        self._write_tables()

    def _say(self, number: int, seconds: float) -> None:
        """Prints one line about a trial that has ended, with the number of ended trials."""
        varied = self._drawn()
        trial = self.trials()[number]
        state = {"COMPLETE": "done", "PRUNED": "stopped", "FAIL": "failed"}[trial.state.name]
        value = figure_of(self.folder(number), self.plan.metric)
        found = f"{self.plan.metric} {value:.4f}" if value is not None else ""
        best = "  best so far" if self._best() and self._best()[0].number == number else ""
        what = trial.user_attrs.get("error") or "  ".join(
            f"{key.rpartition('.')[2]}={_short(v)}"
            for key, v in trial.user_attrs["settings"].items()
            if key in varied or not varied
        )
        style = {"done": "green" if best else None, "stopped": "yellow", "failed": "red"}[state]
        ended, wanted = len(self.trials("COMPLETE", "PRUNED", "FAIL")), self.progress.wanted
        line = f"{ended} of {wanted}: trial {number:>3}  {state:<8}{found}{best}  {seconds:.0f} s  {what}"
        self.progress.say(line, style)

    # Results.

    def _best(self) -> list[Any]:
        """The complete trials, best first."""
        sign = 1 if self.plan.mode == "min" else -1
        return sorted(self.trials("COMPLETE"), key=lambda trial: sign * trial.value)

    def _write_tables(self) -> None:
        """Writes `trials.csv`, one row per ended trial, and `best.yaml`, the best trial's config as a run file."""
        keys = [parameter.key for parameter in self.plan.parameters]
        rows = []
        for trial in self.trials("COMPLETE", "PRUNED", "FAIL"):
            settings = trial.user_attrs.get("settings", {})
            complete = trial.state.name == "COMPLETE"
            value = trial.value if complete else figure_of(self.folder(trial.number), self.plan.metric)
            rows.append([trial.number, trial.state.name.lower(), value, *(written(settings.get(key)) for key in keys)])
        write_table(self.out / "trials.csv", ["trial", "state", self.plan.metric, *keys], rows)
        best = self._best()
        if best and (config := self.folder(best[0].number) / "config.yaml").is_file():  # else the user has deleted it
            head = f"# Trial {best[0].number} of {self.plan.path.name}: {self.plan.metric} {best[0].value:.4f}.\n"
            with replacing(self.out / "best.yaml") as new:
                new.write_text(head + config.read_text(encoding="utf-8"), encoding="utf-8")

    def report(self) -> None:
        """Writes the tables, draws the plots and prints the best trial.

        Raises:
            ValueError: When no trial has finished.
        """
        self._write_tables()
        best = self._best()
        if not best:
            if self.trials("RUNNING"):
                raise ValueError(
                    "a sweep must have a trial that finishes, but all of them were interrupted; run the same command "
                    "again to resume"
                )
            failed = self.trials("FAIL")
            error = failed[-1].user_attrs.get("error") if failed else "all were stopped early"
            raise ValueError(f"a sweep must have a trial that finishes, but has none; the last: {error}")
        draw(self.study, self.plan, self.out, SEED)
        print(f"{'best trial':<22}{self.folder(best[0].number)}")
        print(f"{self.plan.metric:<22}{best[0].value:.4f}")
        if (self.out / "best.yaml").is_file():
            print(f"{'its run file':<22}{self.out / 'best.yaml'}")

    def say_whether_seeds_matter(self, seeds: int) -> None:
        """Prints one line that says whether the best trial differs from the runner-up by more than seeds do."""
        first, second = (*self._best(), None)[:2]
        if second is None:
            print("Only one trial finished: there is nothing to compare the best with.")
            return
        names = f"best trial {first.number}", f"runner-up {second.number}"
        if not seeds:
            print(
                f"The {names[0]} is ahead of the {names[1]} by {abs(first.value - second.value):.4f}; one seed cannot "
                f"tell whether that is chance: --seeds 5 trains both with five more."
            )
            return
        # New seeds only: the seed by which the best trial was chosen favours it.
        with SweepProgress(self.plan.metric, 2 * seeds) as self.progress:
            values = [[self._with_seed(trial, SEED + 1 + n) for n in range(seeds)] for trial in (first, second)]
        line = verdict(*values, *names, self.plan.mode)
        self.study.set_user_attr("verdict", line)
        print(line)

    def _with_seed(self, trial: Any, seed: int) -> float:
        """The metric that a trial's settings reach with another seed; trained once, then read from the study."""
        folder, done = self.out / "seeds" / f"{trial.number:03d}_seed{seed}", f"{trial.number}/{seed} of all"
        if done in self.study.user_attrs:
            self.progress.ended += 1
        else:
            words = [*self.plan.words(trial.user_attrs["settings"]), *self.more, "--seed_everything", str(seed)]
            if not (self.folder(trial.number) / "config.yaml").is_file():
                raise ValueError(
                    f"--seeds must find the trials that it compares, but {self.folder(trial.number)} is gone"
                )
            if "data.seed" in read_run(self.folder(trial.number)).settings:
                words += ["--data.seed", str(seed)]
            process = TrialRun(words, folder, self.threads)
            name = f"trial {trial.number} with seed {seed}"
            self.progress.begin(name, process)
            try:
                while process.exit_code is None:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    self.progress.look()
            except BaseException:
                process.interrupt()
                process.wait()
                raise
            self.progress.end(name)
            value = figure_of(folder, self.plan.metric)
            if process.exit_code == INTERRUPTED:
                raise ValueError(f"{name} must finish, but was stopped; run the same command again to resume")
            if process.exit_code or value is None or not math.isfinite(value):
                reason = process.last_line() if process.exit_code else f"its {self.plan.metric} is {value}"
                raise ValueError(f"trial {trial.number} must train with seed {seed} too, but {reason}")
            self.study.set_user_attr(done, value)
            log.info(f"{name}: {self.plan.metric} {value:.4f}")
        return self.study.user_attrs[done]


def _short(value: Any) -> str:
    """A value in short form, for a line with several."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return written(value).rpartition("/")[2] if isinstance(value, str) else json.dumps(value)
