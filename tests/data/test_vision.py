import functools
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

import lit_llm
from lit_llm.data import image_cache, vision
from lit_llm.data.image_augmentation import ImageAugmentation
from lit_llm.data.image_cache import read_image
from lit_llm.data.vision import VisionData
from tests.images import noise, tree, truncated

MNIST = Path(lit_llm.__file__).parents[2] / "shared" / "data" / "mnist"


def names(data: VisionData, split: str, rows: list[int]) -> list[str]:
    return [line["image"] for line in data.texts(split, rows)]


def made(stage: str = "fit", doing: str | None = None, **arguments: Any) -> VisionData:
    data = VisionData(**{"batch_size": 4, **arguments})
    if doing is not None:
        data.trainer = SimpleNamespace(state=SimpleNamespace(fn=doing), global_rank=0, world_size=1)
    data.prepare_data()
    data.setup(stage)
    return data


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tree(tmp_path / "images", {"cat": 20, "dog": 10, "ox": 10}))


def pixels_of(data: VisionData, split: str, row: int) -> np.ndarray:
    [name] = names(data, split, [row])
    return np.asarray(Pillow.open(name))[None]


# Reading.


def test_each_image_is_read_with_its_own_label_and_normalised_whatever_the_order(folder) -> None:
    data = made(path=folder, validation_fraction=0.2, test_fraction=0.1)
    mean, std = data.normalization["mean"][0], data.normalization["std"][0]
    seen = []
    for split, loader in {
        "train": data.train_dataloader(),
        "validation": data.val_dataloader(),
        "test": data.test_dataloader(),
    }.items():
        for batch in loader:
            rows = batch["rows"].tolist()
            for row, label, pixels in zip(rows, batch["labels"].tolist(), batch["pixel_values"], strict=True):
                [name] = names(data, split, [row])
                assert Path(name).parent.name == data.label_name(label)
                expected = (pixels_of(data, split, row) / 255 - mean) / std
                np.testing.assert_allclose(pixels, expected, atol=1e-5)
                seen.append(name)
    assert len(seen) == len(set(seen)) == len(data.splits["train"]) // 4 * 4 + 12


def test_facts_are_learnt_from_the_training_split_alone(folder) -> None:
    data = made(path=folder, validation_fraction=0.2, test_fraction=0.1)
    assert data.class_names == ["cat", "dog", "ox"]
    assert data.class_counts == [14, 7, 7]
    assert data.image_shape == (1, 6, 6)
    pixels = np.stack([pixels_of(data, "train", row) for row in range(28)]) / 255
    assert data.normalization == {"mean": [pytest.approx(pixels.mean())], "std": [pytest.approx(pixels.std())]}
    assert data.monitor is None
    assert data.num_targets is None


def test_without_normalisation_pixels_are_from_black_to_white(folder) -> None:
    data = made(path=folder, normalize=False)
    batch = next(iter(data.train_dataloader()))
    for row, pixels in zip(batch["rows"].tolist(), batch["pixel_values"], strict=True):
        np.testing.assert_allclose(pixels, pixels_of(data, "train", row) / 255, atol=1e-7)


def test_raw_images_are_those_of_the_rows(folder) -> None:
    data = made(path=folder)
    images = data.images("validation", [2, 0])
    assert images.dtype == torch.uint8
    assert np.array_equal(images[0], pixels_of(data, "validation", 2))


def test_images_are_decoded_once(folder, monkeypatch) -> None:
    made(path=folder)
    monkeypatch.setattr(image_cache, "read_image", None)
    made(path=folder, validation_fraction=0.3)
    with pytest.raises(ValueError, match="cannot: 'NoneType' object is not callable"):
        made(path=folder, image_size=5)


def test_images_are_decoded_anew_once_they_are_read_otherwise(folder, monkeypatch) -> None:
    before = made(path=folder).cache
    monkeypatch.setattr(vision, "READING", image_cache.READING + 1)
    monkeypatch.setattr(image_cache, "read_image", lambda *asked: 255 - read_image(*asked))
    assert np.array_equal(made(path=folder).cache.pixels, 255 - before.pixels)
    monkeypatch.undo()
    assert made(path=folder).cache.folder == before.folder


def test_equal_images_stay_together_in_a_split(tmp_path) -> None:
    tree(tmp_path, {"a": 30, "b": 30})
    for number in range(30):
        noise(number).save(tmp_path / "a" / f"again{number:03}.png")
    data = made(path=str(tmp_path), validation_fraction=0.3)
    held_out = [pixels_of(data, "validation", row).tobytes() for row in range(len(data.splits["validation"]))]
    training = [pixels_of(data, "train", row).tobytes() for row in range(len(data.splits["train"]))]
    assert not set(held_out) & set(training)


def test_splits_that_are_there_are_kept(tmp_path) -> None:
    for number, (split, count) in enumerate({"train": 8, "val": 3, "test": 5}.items()):
        tree(tmp_path / split, {"a": count, "b": count}, first=100 * number)
    data = made(path=str(tmp_path), test_fraction=0.5)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 16, "validation": 6, "test": 10}


@pytest.mark.skipif(not MNIST.is_dir(), reason="the real MNIST is not here")
def test_mnist_is_read_from_the_hubs_layout() -> None:
    data = made(path=str(MNIST), max_examples=1000)
    assert data.image_shape == (1, 28, 28)
    assert data.class_names == [str(digit) for digit in range(10)]
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 1000,
        "validation": 5999,
        "test": 10000,
    }
    data = made(path=str(MNIST), validation_fraction=0.0)
    assert data.normalization == {"mean": [pytest.approx(0.1307, abs=5e-5)], "std": [pytest.approx(0.3081, abs=5e-5)]}


# Sampling.


def test_balanced_classes_come_equally_often(folder) -> None:
    data = made(path=folder, balance_classes=True, batch_size=6, validation_fraction=0.0)
    counts = np.bincount(torch.cat([batch["labels"] for batch in data.train_dataloader()]), minlength=3)
    assert counts.max() - counts.min() <= 5  # an epoch has 36 of the 40 rows
    assert counts[0] < 18


def test_a_few_labels_leave_the_others_unlabelled_in_two_views(folder) -> None:
    augmentation = ImageAugmentation(flip=0.5, randaugment=2)
    arguments = {"labels_per_class": 2, "unlabelled_ratio": 2, "batch_size": 3, "validation_fraction": 0.0}
    data = made(path=folder, augmentation=augmentation, **arguments)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 6, "unlabelled": 34}
    batches = list(data.train_dataloader())
    assert len(batches) == 34 // 6
    plain = {"train": data.ordered_dataloader("train"), "unlabelled": data.ordered_dataloader("unlabelled")}
    as_is = {
        name: {row: pixels for batch in loader for row, pixels in zip(batch["rows"].tolist(), batch["pixel_values"])}
        for name, loader in plain.items()
    }
    other = 0
    for batch in batches:
        weak, strong = batch["unlabelled"], batch["unlabelled_strong"]
        assert torch.equal(weak["rows"], strong["rows"])
        assert batch["labels"].dtype == torch.long
        for view, name in ((batch, "train"), (weak, "unlabelled")):
            for row, pixels in zip(view["rows"].tolist(), view["pixel_values"], strict=True):
                original = as_is[name][row]
                assert any(torch.allclose(pixels, each, atol=1e-6) for each in (original, original.flip(-1)))
        other += int(((weak["pixel_values"] - strong["pixel_values"]).abs().amax(dim=(1, 2, 3)) > 1e-3).sum())
    assert other > 20


def test_mixed_images_have_probabilities_of_the_shares_of_their_classes(folder) -> None:
    data = made(path=folder, augmentation=ImageAugmentation(mixup=1.0), validation_fraction=0.0, normalize=False)
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].shape == (4, 3)
    torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(4))
    augmentation, rows = data.augmentation, batch["rows"].numpy()
    partners = augmentation.partners(rows, 40, (0, 0))
    _, own = augmentation.mix(batch["pixel_values"], batch["pixel_values"], rows, (0, 0))
    labels = data.splits["train"].labels
    for place, (row, partner) in enumerate(zip(rows.tolist(), partners.tolist(), strict=True)):
        mixed = own[place] * data.images("train", [row]) + (1 - own[place]) * data.images("train", [partner])
        torch.testing.assert_close(batch["pixel_values"][place], mixed[0] / 255)
        share = float(batch["labels"][place, labels[row]])
        assert share == pytest.approx(1.0 if labels[row] == labels[partner] else float(own[place]), abs=1e-6)
    assert all(batch["labels"].ndim == 1 for batch in data.ordered_dataloader("train"))


def test_augmented_batches_are_the_same_after_a_resume_and_others_in_the_next_epoch(folder) -> None:
    def loader() -> Any:
        return made(path=folder, augmentation=ImageAugmentation(rotate=20.0, flip=0.5)).train_dataloader()

    whole, first = loader(), loader()
    epochs = [list(whole), list(whole)]
    reading = iter(first)
    for _ in range(3):
        next(reading)
    again = loader()
    again.load_state_dict(first.state_dict())
    for got, expected in zip([*again, *again], [*epochs[0][3:], *epochs[1]], strict=True):
        assert torch.equal(got["pixel_values"], expected["pixel_values"])
    by_row = [{int(r): p for b in epoch for r, p in zip(b["rows"], b["pixel_values"])} for epoch in epochs]
    assert not any(torch.equal(by_row[0][row], by_row[1][row]) for row in by_row[0].keys() & by_row[1].keys())


# Checkpoints and model directories.


def test_a_flat_folder_is_predicted_as_the_checkpoint_reads_images(folder, tmp_path) -> None:
    trained = made(path=folder)
    (tmp_path / "flat").mkdir()
    for number in range(3):
        noise(number, 20, 30, "RGB").save(tmp_path / "flat" / f"{number}.jpg")
    data = made("predict", "predict", path=str(tmp_path / "flat"))
    data.load_state_dict(json.loads(json.dumps(trained.state_dict())))
    assert data.class_names == ["cat", "dog", "ox"]
    assert data.image_shape == (1, 6, 6)
    assert data.normalization == trained.normalization
    [batch] = data.predict_dataloader()
    assert "labels" not in batch
    mean, std = (trained.normalization[name][0] for name in ("mean", "std"))
    expected = image_cache.read_image({"path": str(tmp_path / "flat" / "1.jpg")}, 1, 6, 6)
    np.testing.assert_allclose(batch["pixel_values"][1], (expected / 255 - mean) / std, atol=1e-5)
    assert data.texts("test", [1]) == [{"image": str(tmp_path / "flat" / "1.jpg")}]


def test_folders_of_some_of_the_classes_are_predicted_with_the_checkpoints_classes(folder, tmp_path) -> None:
    trained = made(path=folder)
    data = made("predict", "predict", path=str(tree(tmp_path / "new", {"ox": 2, "dog": 1})))
    data.load_state_dict(trained.state_dict())
    [batch] = data.predict_dataloader()
    assert [data.label_name(label) for label in batch["labels"].tolist()] == ["dog", "ox", "ox"]


def test_of_the_runs_own_images_those_it_was_not_trained_on_are_predicted(folder) -> None:
    trained = made(path=folder)
    data = made("predict", "predict", path=folder)
    data.load_state_dict(trained.state_dict())
    batches = list(data.predict_dataloader())
    assert sum(len(batch["rows"]) for batch in batches) == len(trained.splits["validation"]) == 4
    assert names(data, data.predict_split, [0, 1, 2, 3]) == names(trained, "validation", [0, 1, 2, 3])


def test_other_images_are_tested_in_the_checkpoints_size(folder, tmp_path) -> None:
    trained, other = made(path=folder), tmp_path / "other"
    for name in ("cat", "dog", "ox"):
        (other / name).mkdir(parents=True)
        for number in range(4):
            noise(number, 9, 9, "RGB").save(other / name / f"{name}{number}.png")
    data = made("test", "test", path=str(other), test_fraction=0.5)
    assert data.image_shape == (3, 9, 9)
    data.load_state_dict(trained.state_dict())
    assert data.image_shape == (1, 6, 6)
    assert next(iter(data.test_dataloader()))["pixel_values"].shape == (4, 1, 6, 6)
    assert data.normalization == trained.normalization


def test_training_does_not_go_on_with_images_of_another_shape_or_other_classes(folder, tmp_path) -> None:
    trained = made(path=folder)
    message = (
        "data.image_size and data.channels must be the checkpoint's, 6 × 6 pixels of 1 channel, but are 5 × 5 pixels"
    )
    with pytest.raises(ValueError, match=f"^{message} of 3 channels in "):
        made(doing="fit", path=folder, image_size=5, channels=3).load_state_dict(trained.state_dict())
    other = made(path=str(tree(tmp_path / "new", {"ox": 20, "dog": 20})))
    with pytest.raises(
        ValueError, match=r"^data.label must have the checkpoint's classes, cat, dog, ox, but has dog, ox"
    ):
        other.load_state_dict(trained.state_dict())
    state = trained.state_dict()
    next(Path(folder).rglob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"^data.path must hold the rows .* had \d+ rows then and has \d+ now; "):
        made(doing="fit", path=folder).load_state_dict(state)


@pytest.mark.parametrize(
    ("named", "shape", "own_mean"),
    [({}, (3, 8, 8), False), ({"image_size": 4}, (3, 4, 4), False), ({"channels": 1}, (1, 8, 8), True)],
)
def test_what_a_network_starts_from_says_how_images_are_read_unless_that_is_named(
    folder, named, shape, own_mean
) -> None:
    processor = {"size": {"height": 8, "width": 8}, "image_mean": [0.25] * 3, "image_std": [0.5] * 3}
    data = VisionData(path=folder, batch_size=4, **named)
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), global_rank=0, world_size=1)
    trainer.lightning_module = SimpleNamespace(image_processor=processor)
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    assert data.image_shape == shape
    assert (data.normalization["mean"] != [0.25] * 3) == own_mean


# Refusals.


def refused(message: str, kind: type[Exception] = ValueError) -> Any:
    return pytest.raises(kind, match=f"^{message}")


def test_a_broken_image_is_named_and_refused_or_skipped(folder, caplog) -> None:
    broken = truncated(Path(folder) / "dog" / "025.png")
    noise(0, 40, 40).crop((0, 0, 6, 6)).save(Path(folder) / "ox" / "x.png")
    with refused(rf"data.path must hold images that can be read, but '{broken}' of the train split of {folder} cannot"):
        made(path=folder)
    with caplog.at_level(logging.WARNING):
        data = made(path=folder, broken="skip", image_size=6, validation_fraction=0.0)
    assert f"Skipped 1 broken of 41 images of the train split: '{broken}'" in caplog.text
    assert data.class_counts == [20, 9, 11]
    assert str(broken) not in names(data, "train", list(range(40)))
    for row in (0, 25, 39):
        assert np.array_equal(data.images("train", [row])[0], pixels_of(data, "train", row))


def test_who_asks_for_what_was_found_out_finds_it_decoded(tmp_path, caplog) -> None:
    folder = str(tree(tmp_path, {"cat": 6, "dog": 6}))
    caplog.set_level("INFO")
    first, asked = (made(path=folder, validation_fraction=0.5, **o) for o in ({}, {"image_size": 6, "channels": 1}))
    assert np.array_equal(asked.cache.pixels, first.cache.pixels)
    assert caplog.text.count("Decoded 12 images") == 1
    shutil.rmtree(first.cache.folder)  # but not the reference to it
    again = made(path=folder, validation_fraction=0.5, image_size=6, channels=1)
    assert np.array_equal(again.cache.pixels, first.cache.pixels)


def test_mixed_sizes_and_modes_become_one(tmp_path) -> None:
    tree(tmp_path, {"a": 4, "b": 4})
    noise(50, 9, 12, "RGB").save(tmp_path / "a" / "large.png")
    data = made(path=str(tmp_path), validation_fraction=0.0, image_size=8)
    assert data.image_shape == (3, 8, 8)
    [row] = [row for row in range(9) if names(data, "train", [row])[0].endswith("large.png")]
    expected = noise(50, 9, 12, "RGB").resize((10, 8), Pillow.Resampling.BILINEAR).crop((1, 0, 9, 8))
    assert np.array_equal(data.images("train", [row])[0].permute(1, 2, 0), np.asarray(expected))


def test_labels_beyond_the_class_names_are_refused(tmp_path) -> None:
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": [noise(n) for n in range(4)], "label": [0, 1, 7, 0]}, features)
    rows.info.features = Features(
        {**features, "label": ClassLabel(names=["a", "b"])}
    )  # unlike a cast, this checks no value
    path = str(tmp_path / "x.parquet")
    rows.to_parquet(path)
    with refused(
        r"data.label must be a class from 0 to 1 \(a, b\), but 'label' is 7 in row 2 of the training split of"
    ):
        made(path=path)


def test_one_class_alone_is_refused_by_its_name(tmp_path) -> None:
    with refused(
        r"data.label must tell two classes or more apart, but is 'cat' in all 5 rows of the training split of"
    ):
        made(path=str(tree(tmp_path, {"cat": 5})))


def test_images_without_classes_cannot_be_trained_on(tmp_path) -> None:
    noise(0).save(tmp_path / "0.png")
    with refused(
        r"data.path must tell the classes of images, by a folder for each or a column data.label, but \S+ has n"
    ):
        made(path=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "data.image_size must be at least 1, but is 0"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, but is 0"),
        ({"unlabelled_ratio": -1}, "data.unlabelled_ratio must be at least 0, but is -1"),
        (
            {"validation_fraction": 0.6, "test_fraction": 0.4},
            "data.validation_fraction and data.test_fraction must be at least 0 and leave something to train on, but are "
            "0.6 and 0.4",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message) -> None:
    with refused(re.escape(message) + "$"):
        VisionData(**arguments)


def test_a_network_learns_the_embedded_digits(tmp_path) -> None:
    from lightning.pytorch import Trainer

    from lit_llm.models.pretrained_classifier import PretrainedClassifier
    from lit_llm.objectives.classification import Classification

    config = {
        "model_type": "resnet",
        "num_channels": 1,
        "embedding_size": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
    }
    config |= {"layer_type": "basic", "hidden_act": "relu"}
    adamw = functools.partial(torch.optim.AdamW, lr=5e-3)
    model = Classification(functools.partial(PretrainedClassifier, config=config), adamw)
    trainer = Trainer(
        accelerator="cpu", max_steps=40, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=VisionData(image_size=16, batch_size=32))
    trainer.validate(model, datamodule=trainer.datamodule, verbose=False)
    assert trainer.callback_metrics["val/accuracy"] > 0.6
