from __future__ import annotations

import yaml

from lit_llm.cli.command_line import with_the_runs_config


def test_run_files_come_before_the_options_that_are_laid_over_them_and_keep_their_order(tmp_path):
    words = [
        "fit",
        "--model.x",
        "1",
        "--config",
        "a.yaml",
        "--print_config",
        "--config=b.yaml",
        "-c",
        "c.yaml",
        "--y=2",
    ]
    files = ["--config", "a.yaml", "--config=b.yaml", "-c", "c.yaml"]
    assert with_the_runs_config(words) == ["fit", *files, "--model.x", "1", "--print_config", "--y=2"]
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
