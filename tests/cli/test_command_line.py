from __future__ import annotations

import pytest
import yaml

from lit_llm.cli.command_line import run_files, with_the_runs_config


def test_options_come_after_the_first_run_files_and_later_ones_keep_their_order(tmp_path):
    files, before, after = (
        ["--config", "a.yaml", "--config=b.yaml"],
        ["--x", "1"],
        ["--y=2", "--config", "c.yaml", "--z", "3"],
    )
    assert with_the_runs_config(["fit", *before, *files, *after]) == ["fit", *files, *before, *after]
    assert with_the_runs_config(["fit", *files, *after]) == ["fit", *files, *after]
    assert with_the_runs_config(["fit", "--y=2", "--config"]) == ["fit", "--config", "--y=2"]
    own, overlay = tmp_path / "config.yaml", tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_steps: 2}")
    own.touch()
    run = ["--run_dir", str(tmp_path)]
    assert with_the_runs_config(["test", *run, "--config", str(overlay)]) == [
        *("test", "--config", str(own)),
        *("--config", str(overlay)),
        *run,
    ]


def test_an_option_before_a_run_file_is_laid_over_it_too(lit_llm, tiny):
    outcome = lit_llm("fit", "--seed_everything", "2", "--trainer.max_steps", "9", *tiny[:2], "--print_config")
    assert outcome.code == 0, outcome.err
    found = yaml.safe_load(outcome.out)
    assert (found["seed_everything"], found["trainer"]["max_steps"]) == (2, 9)


@pytest.mark.parametrize("short", [["-c", "a.yaml"], ["-c=a.yaml"], ["-ca.yaml"]])
def test_run_files_of_the_short_option_come_first_too(short):
    assert with_the_runs_config(["fit", "--x", "1", *short])[-2:] == ["--x", "1"]
    assert run_files(short) == ["a.yaml"]


def test_an_abbreviated_option_is_none(lit_llm, tiny):
    """It would be read, but neither come first, nor be known to what looks for it before it is parsed."""
    outcome = lit_llm("fit", "--trainer.max_steps", "9", "--conf", tiny[1], "--print_config")
    assert outcome.code == 2
    assert outcome.err == "lit-llm: error: conf must be an option, but is none; did you mean config?\n"
