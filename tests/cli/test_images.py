"""An image classifier from the command line: trained, applied to a folder of files, and fine-tuned on others."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.images import noise, tree

RESNET = {"model_type": "resnet", "num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
RESNET |= {"layer_type": "basic", "hidden_act": "relu"}


@pytest.fixture
def config(tmp_path: Path) -> str:
    network = {
        "class_path": "lit_llm.models.pretrained_classifier.PretrainedClassifier",
        "init_args": {"config": RESNET},
    }
    content = {
        "model": {"class_path": "lit_llm.objectives.classification.Classification", "init_args": {"network": network}},
        "data": {"class_path": "lit_llm.data.vision.VisionData", "init_args": {"image_size": 16, "batch_size": 16}},
        "trainer": {"max_steps": 4, "max_epochs": -1, "val_check_interval": 2, "limit_val_batches": 2},
    }
    (tmp_path / "images.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "images.yaml")


def digits(folder: Path, change=lambda image: image) -> Path:
    """Sixty of the digits as files, one folder per class."""
    found = load_digits()
    for number in range(60):
        pixels = np.rint(found.images[number] * (255 / 16)).astype(np.uint8)
        (folder / str(found.target[number])).mkdir(parents=True, exist_ok=True)
        change(Image.fromarray(pixels).resize((20, 30))).save(folder / str(found.target[number]) / f"{number:02}.png")
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_is_asked_about_files_gone_on_from_and_trained_further_on_others(lit_llm, config, tmp_path) -> None:
    run = tmp_path / "run"
    outcome = lit_llm("fit", "--config", config, "--run_dir", run)
    assert outcome.code == 0, outcome.err
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["test/accuracy"] <= 1

    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted(digits(tmp_path / "digits").rglob("*.png"))[:7]:
        Image.open(file).convert("RGB").save(flat / file.name)
    outcome = lit_llm("predict", "--run_dir", run, "--data.path", flat)
    assert outcome.code == 0, outcome.err
    [written] = (run / "evaluations").glob("predict-*/predictions.csv")
    lines = table(written)
    assert [Path(line["image"]) for line in lines] == sorted(flat.iterdir())

    # transformers reads images, weights and names of the directory in the same way
    model = AutoModelForImageClassification.from_pretrained(run / "model").eval()
    processor = AutoImageProcessor.from_pretrained(run / "model")
    images = [Image.open(line["image"]).convert("L") for line in lines]
    with torch.no_grad():
        theirs = model(torch.from_numpy(processor(images, return_tensors="np")["pixel_values"])).logits.softmax(-1)
    ours = [[float(line[f"p({name})"]) for name in model.config.id2label.values()] for line in lines]
    torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-4, rtol=0)

    # if the data determined the preprocessing, it is read from the checkpoint, and files are decoded only once
    own = tmp_path / "own"
    assert lit_llm("fit", "--config", config, "--data.image_size", "null", "--run_dir", own).code == 0
    outcome = lit_llm("predict", "--run_dir", own, "--data.path", flat)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("Decoded 7 images into 8 × 8 pixels with 1 channel") == outcome.err.count("Decoded") == 1

    # all labelled images of another folder are evaluated, preprocessed for the network
    held = digits(tmp_path / "held" / "test").parent
    for asked in (run, own):
        outcome = lit_llm("test", "--run_dir", asked, "--data.path", held)
        assert outcome.code == 0, outcome.err
        [written] = (asked / "evaluations").glob("test-*")
        assert json.loads((written / "results.json").read_text())["test/count"] == 60

    # fine-tuning on inverted digits of another size keeps the network's preprocessing
    inverted, second = digits(tmp_path / "inverted", ImageOps.invert), tmp_path / "second"
    start = ["--model.network", "null", "--model.weights", run, "--data.image_size", "null", "--data.path", inverted]
    outcome = lit_llm("fit", "--config", config, *start, "--run_dir", second)
    assert outcome.code == 0, outcome.err
    name = "model/preprocessor_config.json"
    assert (second / name).read_text() == (run / name).read_text()

    outcome = lit_llm("fit", "--run_dir", second, "--ckpt_path", "last", "--trainer.max_steps", "6")
    assert outcome.code == 0, outcome.err
    assert json.loads((second / "results.json").read_text())["step"] == 6


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_images_of_another_size_are_evaluated_in_that_of_the_network(lit_llm, config, tmp_path, command) -> None:
    small, held = tree(tmp_path / "small", {"cat": 20, "dog": 20}, side=8), tmp_path / "held"
    large = tree(held / ("validation" if command == "validate" else "test"), {"cat": 3, "dog": 4}, side=30)
    noise(99, 30, 40, mode="RGB").save(large / "cat" / "wide.png")
    network = ["--model.network", "lit_llm.models.lenet.LeNet", "--model.network.width", "2"]
    ours = ["--data.path", small, "--data.image_size", "null", "--trainer.max_steps", "2"]
    outcome = lit_llm("fit", "--config", config, *network, *ours, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    outcome = lit_llm(command, "--run_dir", tmp_path / "run", "--data.path", held)
    assert outcome.code == 0, outcome.err
    assert "Decoded 8 images into 8 × 8 pixels with 1 channel" in outcome.err


def test_mistakes_about_images_are_said_in_one_line(lit_llm, config, tmp_path) -> None:
    folder = tree(tmp_path / "pictures", {"cat": 20, "dog": 20})
    (folder / "dog" / "x.png").write_bytes(b"no image")
    outcome = lit_llm("fit", "--config", config, "--data.path", folder, "--run_dir", tmp_path / "run")
    assert outcome.code == 2 or outcome.code == 1
    assert (
        f"data.path must hold images that can be read, but '{folder}/dog/x.png' of the train split" in outcome.last_line
    )
    outcome = lit_llm("fit", "--config", config, "--data.path", tmp_path / "none", "--run_dir", tmp_path / "run")
    assert "data.path must be sklearn-digits, a hub data set, Parquet with a column of images" in outcome.last_line
    assert len(outcome.err.strip().splitlines()) <= 3
