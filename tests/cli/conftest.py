from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


@pytest.fixture
def lit_llm(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a command line in this process."""
    from lit_llm.cli import main

    monkeypatch.setattr(sys, "argv", ["lit-llm"])
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words: object) -> Outcome:
        os.environ.pop("LIT_LLM_RUN_DIR", None)
        capsys.readouterr()
        try:
            main([str(word) for word in words])
            code = 0
        except SystemExit as end:
            code = end.code
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eighty small texts."""
    folder = tmp_path_factory.mktemp("texts")
    chance = random.Random(0)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "one",
        "red",
        "bird",
        "fly",
        "over",
        "猫",
        "坐",
        "在",
        "垫子",
        "上",
    ]
    for number in range(80):
        text = " ".join(chance.choices(words, k=40)) + f" {number}\n"
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def tiny(texts: Path) -> list[str]:
    """The main config, shrunk to a network and a corpus that train in a moment."""
    return [
        "--config",
        str(REPOSITORY / "configs/pretraining/llama_stdlib.yaml"),
        *("--model.network.d_model", "16", "--model.network.num_layers", "1", "--model.network.num_heads", "2"),
        *("--data.path", str(texts), "--data.tokenizer", "bytes", "--data.seq_len", "32", "--data.batch_size", "4"),
        *("--data.validation_fraction", "0.1", "--data.test_fraction", "0.1"),
        *("--trainer.max_steps", "6", "--trainer.val_check_interval", "3", "--trainer.log_every_n_steps", "1"),
        *("--trainer.precision", "32-true", "--trainer.num_sanity_val_steps", "0"),
    ]
