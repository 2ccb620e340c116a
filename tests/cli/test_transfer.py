"""An image network trained on one data set, then on another: pre-training helps, and preprocessing is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.writing import REPOSITORY

CONFIGS = REPOSITORY / "configs"


@pytest.fixture
def rotated(tmp_path) -> Path:
    """Rotated digits of scikit-learn as files, one folder per class."""
    folder = tmp_path / "rotated"
    found = load_digits()
    for number, (pixels, label) in enumerate(zip(found.images[:500], found.target[:500], strict=True)):
        (folder / str(label)).mkdir(exist_ok=True, parents=True)
        picture = Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8))
        picture.rotate(20, Image.Resampling.BILINEAR).save(folder / str(label) / f"{number}.png")
    return folder


@pytest.mark.slow
def test_what_was_learnt_on_digits_helps_on_rotated_digits(lit_llm, rotated, tmp_path) -> None:
    first = [
        "--config",
        CONFIGS / "pretraining/cnn_digits.yaml",
        "--trainer.max_epochs",
        4,
        "--test_after_fit",
        "false",
    ]
    outcome = lit_llm("fit", *first, "--run_dir", tmp_path / "digits")
    assert outcome.code == 0, outcome.err
    second = ["--config", CONFIGS / "finetuning/cnn_images.yaml", "--data.path", rotated, "--data.test_fraction", 0.5]
    second += ["--data.batch_size", 32, "--trainer.max_epochs", 1, "--model.weights", tmp_path / "digits/model"]
    outcome = lit_llm("fit", *second, "--run_dir", tmp_path / "tuned")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "tuned/results.json").read_text())["test/accuracy"] > 0.9  # in six steps
    read = [
        json.loads((tmp_path / name / "model/preprocessor_config.json").read_text()) for name in ("digits", "tuned")
    ]
    assert read[0] == read[1]
