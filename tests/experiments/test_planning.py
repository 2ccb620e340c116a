"""Plans are compared with measurements of runs."""

from __future__ import annotations

import json

from experiments.planning import run as planning
from tests.writing import places


def found(flops: float = 1e9, moved: float = 1e9, seconds: float = 3.0, peak: float = 100) -> dict:
    step = {"flops": flops, "moved": moved, "weights": 10, "optimizer": 20, "passes": 70, "stepping": 5}
    return {"steps": {"as configured": step}, "probe": {"peak": peak, "seconds_per_step": seconds}}


def test_times_are_compared_and_judged_where_they_did_not_calibrate():
    options = planning.parsed(["--rounds", "1"])
    runs = [[found()], [found(2e9, seconds=4.4)], [found(4e9, seconds=6.0)]]
    lines = planning.time_table(list(zip(planning.TINY, runs, strict=True)), options)
    assert "1e+09 operations/s and 5e+08 bytes/s" in lines[0]
    assert lines[-1] == "time: at most 9.1% off, goal 15%: met."
    assert sum("calibrates" in line for line in lines) == 2
    assert places("planning", "planning-time") == 1


def test_memory_is_judged_where_freed_tensors_are_handed_back():
    runs = [[found(peak=105), found(peak=130)], [found(peak=80), found(peak=110)]]
    lines = planning.memory_table(list(zip(planning.TINY, runs, strict=False)), planning.parsed([]))
    assert lines[-1] == (
        "memory: at most 25.0% off, goal 10%: **missed**. A heap that keeps what is freed holds 10% to 30% more."
    )
    assert places("planning", "planning-memory") == 1


def test_memory_of_several_processes_is_judged_by_the_strategy_that_they_took():
    options = planning.parsed([])
    plans = {name: {"peak": peak} for name, peak in (("ddp", 110), ("fsdp", 80))}
    runs = [{"memory": {"as configured": plans}, "probe": {"peak": 100}}] * len(planning.STRATEGIES)
    lines = planning.strategies_table([(planning.GRID[2], runs)], options)
    assert [line.split(" | ")[-1] for line in lines[4:-2]] == ["+10.0% |", "-20.0% |", "-20.0% |"]
    assert lines[-1] == "strategies: at most 20.0% off, goal 10%: **missed**."
    assert planning.measured_strategies(planning.GRID[0], options) == []
    assert places("planning", "planning-strategies") == 1


def test_a_setting_of_the_grid_is_planned_and_probed_by_the_command_line(lit_llm, tmp_path, texts):
    words = planning.plan_words(planning.TINY[0], tmp_path / "plan.json", "32-true", 4)[3:]
    few = ["--data.path", texts, "--data.tokenizer", "bytes", "--data.validation_fraction", "0.1"]
    outcome = lit_llm(*words, *few)
    assert outcome.code == 0, outcome.err
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert planning.costs(plan)[0] > 0
    assert planning.seconds_of([plan]) > 0
    assert plan["probe"]["peak"] >= 0  # 0 if other tests have left enough free memory for so small a network
