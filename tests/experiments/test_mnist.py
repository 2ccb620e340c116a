"""The MNIST recipes take steps; the script they are compared with is the original one."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from experiments.mnist import run as mnist
from experiments.mnist import seed
from lit_llm.models.cnn import CNN
from tests.writing import places


@pytest.fixture
def tiny_mnist(tmp_path):
    """A hundred-odd noise images in the hub's layout."""
    folder = tmp_path / "data/mnist"
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for split, count in (("train", 130), ("test", 70)):
        rows = []
        for row in range(count):
            buffer = io.BytesIO()
            Image.fromarray(chance.integers(0, 255, (28, 28), dtype=np.uint8)).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": row % 10})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return tmp_path / "data"


RECIPES = sorted({recipe.config for table in mnist.TABLES.values() for recipe in table.values() if recipe.config})


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_mnist_takes_two_steps(lit_llm, tiny_mnist, tmp_path, name):
    small = ["--data.path", tiny_mnist / "mnist", "--data.batch_size", "2", "--trainer.max_steps", "2"]
    few = ["--data.labels_per_class", "2"] if "fixmatch" in name else []
    words = ["--config", mnist.CONFIGS / f"{name}.yaml", *small, *few, "--trainer.limit_val_batches", "1"]
    outcome = lit_llm("fit", *words, "--run_dir", tmp_path / "run", "--test_after_fit", "false")
    assert outcome.code == 0, outcome.err


@pytest.mark.filterwarnings("ignore:dropout2d")
def test_the_script_that_we_began_with_runs_and_its_network_is_our_cnn(tiny_mnist, tmp_path, capsys):
    seed.main(["--data", str(tiny_mnist), "--epochs", "2", "--out", str(tmp_path / "out.json")])
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Epoch: 0, Test loss: 0\.\d{4}, Accuracy: 0\.\d{4}", first)
    assert second.startswith("Epoch: 1, ")
    found = json.loads((tmp_path / "out.json").read_text())
    assert {name: len(values) for name, values in found.items()} == {"seconds": 2, "loss": 2, "accuracy": 2}
    theirs, ours = seed.Model().eval(), CNN(10).eval()
    ours.load_state_dict(theirs.state_dict())
    picture, label = seed.MNIST(tiny_mnist, train=False, transform=seed.ToTensor())[3]
    assert label == 3
    assert picture.shape == (1, 28, 28)
    assert 0.9 < picture.max() <= 1
    torch.testing.assert_close(ours(picture[None]).log_softmax(-1), theirs(picture[None]))


def test_recipes_are_held_against_the_script_of_the_same_seed(tmp_path):
    options = mnist.parsed(["recipes", "--data", str(tmp_path), "--seeds", "0,1"])
    found = {}
    for number in (0, 1):
        found[mnist.SEEDS_SCRIPT, number] = {"seconds": 400.0 + 100 * number, "accuracy": 0.985, "images": 600_000}
        found["their recipe", number] = {"seconds": 200.0, "accuracy": 0.984, "images": 570_000}
        found["our network", number] = {"seconds": 5.0, "accuracy": 0.9911, "images": 57_000}
    lines = mnist.table(found, options)
    assert lines[-3] == "| the seeds' script | 98.50 ± 0.00 |  | 450.0 ± 70.7 |  |  | 45.0 ± 7.1 |"
    assert lines[-2] == "| their recipe | 98.40 ± 0.00 |  | 200.0 ± 0.0 | 2.1 ± 0.3 | 1.7 met | 21.1 ± 0.0 |"
    assert lines[-1] == "| our network | 99.11 ± 0.00 | 99.0 met | 5.0 ± 0.0 | 90.0 ± 14.1 | 80.0 met | 5.3 ± 0.0 |"
    assert all(places("mnist", name) == 1 for name in mnist.TABLES)
