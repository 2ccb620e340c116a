"""Plans are compared with what runs take."""

from __future__ import annotations

import json

from experiments.planning import run as planning
from tests.writing import places


def test_plans_are_compared_with_runs_and_judged_where_they_did_not_calibrate():
    def found(flops: float, moved: float, seconds: float, peak: float) -> list[dict]:
        step = {"flops": flops, "moved": moved, "weights": 10, "optimizer": 20, "passes": 70, "stepping": 5}
        return [{"steps": {"as configured": step}, "probe": {"peak": peak, "seconds_per_step": seconds}}]

    options = planning.parsed(["--rounds", "1"])
    runs = [found(1e9, 1e9, 3.0, 100), found(2e9, 1e9, 4.4, 105), found(4e9, 1e9, 6.0, 100)]
    lines = planning.table(list(zip(planning.TINY, runs, strict=True)), options)
    assert "1e+09 operations/s and 5e+08 bytes/s" in lines[0]
    assert lines[-1] == "memory: at most 4.8% off, goal 10%: met; time: at most 9.1% off, goal 15%: met."
    assert sum("calibrates" in line for line in lines) == 2
    assert places("planning", "planning") == 1


def test_a_setting_of_the_grid_is_planned_and_probed_by_the_command_line(lit_llm, tmp_path, texts):
    words = planning.plan_words(planning.TINY[0], tmp_path / "plan.json", "32-true")[3:]
    few = ["--data.path", texts, "--data.tokenizer", "bytes", "--data.validation_fraction", "0.1"]
    outcome = lit_llm(*words, *few)
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "plan.json").read_text())
    assert planning.costs(found)[0] > 0
    assert planning.measured_of([found])[1] > 0
