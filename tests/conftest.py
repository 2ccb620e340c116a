"""Shared by all tests: a private cache, no network access, a corpus with Chinese text, and small networks."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it only on import

import functools
import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from lit_llm import products
from tests.images import tree
from tests.writing import REPOSITORY, pairs, prose

if "SIMULATED_DEVICE" in os.environ:
    importlib.import_module("tests.simulated_device")

settings.register_profile("a busy machine", deadline=None)
settings.load_profile("a busy machine")


@pytest.fixture(scope="session", autouse=True)
def _private_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # `make test` runs two processes, which would slow each other down with two threads each.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_LLM_CACHE", str(tmp_path_factory.mktemp("lit-llm-cache")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets-cache")))
        yield


@pytest.fixture(autouse=True)
def _same_chance_for_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _products_as_torch_has_them() -> Iterator[None]:
    """Resets the library for matrix products, which training in this process changes (`multiply_by_onednn`)."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    products.MAX_QUERIES[torch.float32] = (0, 0)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 60 documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(prose(number), encoding="utf-8")
    return folder


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Makes a tiny network whose parameters are all random instead of initialised.

    Some weights are initialised to zero, so that comparing outputs would compare nothing.
    """
    from lit_llm.models.llama import Llama

    return functools.partial(awake, Llama)


@pytest.fixture
def tiny_gpt2() -> Callable[..., Any]:
    """Like `tiny_llama`, for GPT-2."""
    from lit_llm.models.gpt2 import GPT2

    return functools.partial(awake, GPT2)


def awake(kind: type, seed: int = 0, **changes: Any) -> torch.nn.Module:
    size = {"vocab_size": 37, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "max_seq_len": 64}
    network = kind(**(size | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)
    return network.eval()


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


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of eighty small conversations."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(80)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of sixty small texts of two classes."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    lines = (f'"{row["prompt"]}, {row["response"]}",{("bad", "good")[n % 2]}' for n, row in enumerate(pairs(60)))
    path.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty small pictures of each of two classes, with one folder per class."""
    return tree(tmp_path_factory.mktemp("pictures"), {"cat": 30, "dog": 30})


@pytest.fixture
def tiny(texts: Path) -> list[str]:
    """The main config with a network and a corpus small enough to train in a moment."""
    return [
        "--config",
        str(REPOSITORY / "configs/pretraining/llama_stdlib.yaml"),
        *("--model.network.d_model", "16", "--model.network.num_layers", "1", "--model.network.num_heads", "2"),
        *("--data.path", str(texts), "--data.tokenizer", "bytes", "--data.seq_len", "32", "--data.batch_size", "4"),
        *("--data.validation_fraction", "0.1", "--data.test_fraction", "0.1"),
        *("--trainer.max_steps", "6", "--trainer.val_check_interval", "3", "--trainer.log_every_n_steps", "1"),
        *("--trainer.precision", "32-true", "--trainer.num_sanity_val_steps", "0"),
    ]
