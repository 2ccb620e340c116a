from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lit_llm.callbacks.metrics_csv import MetricsCSV, read_metrics


def log(folder: Path, *rows: tuple[int, dict[str, float]]) -> list[dict[str, float]]:
    logger = MetricsCSV(folder)
    for step, metrics in rows:
        logger.log_metrics(metrics, step)
    logger.finalize("success")
    return read_metrics(folder / "metrics.csv")


def test_a_step_has_one_row_whoever_logs(tmp_path):
    rows = log(tmp_path, (1, {"a": 1.0}), (1, {"b": 2.0}), (2, {"a": 3.0}))
    assert rows == [{"step": 1, "a": 1.0, "b": 2.0}, {"step": 2, "a": 3.0}]


def test_a_new_metric_becomes_a_column_of_all_rows(tmp_path):
    log(tmp_path, (1, {"a": 1.0}), (2, {"a": 2.0}), (3, {"late": 3.0}))
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.reader(file))
    assert table == [["step", "a", "late"], ["1", "1.0", ""], ["2", "2.0", ""], ["3", "", "3.0"]]


def test_what_comes_after_the_last_row_was_written_still_joins_it(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    logger.save()
    logger.log_metrics({"test": 2.0}, 1)
    logger.save()
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 1, "a": 1.0, "test": 2.0}]


def test_a_resumed_run_keeps_earlier_rows_and_drops_what_it_does_again(tmp_path):
    log(tmp_path, (1, {"a": 1.0}), (2, {"a": 2.0}), (3, {"a": 9.0}))
    assert log(tmp_path, (2, {"a": 5.0, "b": 1.0}), (3, {"a": 6.0})) == [
        {"step": 1, "a": 1.0},
        {"step": 2, "a": 5.0, "b": 1.0},
        {"step": 3, "a": 6.0},
    ]


def test_what_a_resumed_run_logs_at_the_step_that_it_goes_on_from_joins_what_is_there(tmp_path):
    log(tmp_path, (2, {"a": 2.0, "val/a": 3.0}))
    assert log(tmp_path, (2, {"lr": 0.1}), (3, {"a": 6.0})) == [
        {"step": 2, "a": 2.0, "val/a": 3.0, "lr": 0.1},
        {"step": 3, "a": 6.0},
    ]


@pytest.mark.parametrize(("begins", "kept"), [(0, []), (2, [1, 2])])
def test_what_was_logged_after_the_step_that_a_run_begins_at_goes(tmp_path, begins, kept):
    log(tmp_path, *((step, {"a": 1.0}) for step in (1, 2, 3, 4)))
    logger = MetricsCSV(tmp_path)
    logger.begin(begins)
    logger.log_metrics({"a": 2.0}, 4)
    logger.finalize("success")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [*kept, 4]


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.csv") == []
