import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from sklearn.datasets import load_digits

from lit_llm.data.image_sources import LAYOUTS, find_image_column, find_label_column, image_names, open_images
from tests.images import noise, tree
from tests.writing import exactly


def labels(rows: Dataset) -> list[str]:
    return [rows.features["label"].names[number] for number in rows["label"]]


def test_the_digits_are_scikit_learns_in_order_from_black_to_white() -> None:
    splits = open_images("sklearn-digits").splits
    digits = load_digits()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1437, "test": 360}
    found = np.stack([np.asarray(image) for rows in splits.values() for image in rows["image"]])
    np.testing.assert_allclose(found / 255, digits.images / 16, atol=0.5 / 255)
    assert [label for rows in splits.values() for label in rows["label"]] == digits.target.tolist()


def test_a_folder_for_each_class_is_one_split_with_the_folders_names(tmp_path: Path) -> None:
    tree(tmp_path, {"dog": 2, "cat": 3, ".hidden": 1})
    noise(9).save(tmp_path / "cat" / ".thumbnail.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "dog" / "more").mkdir()
    noise(8).save(tmp_path / "dog" / "more" / "8.JPG")
    rows = open_images(str(tmp_path)).splits["train"]
    assert labels(rows) == ["cat"] * 3 + ["dog"] * 3
    assert [Path(name).name for name in image_names(rows, "image")] == [
        "002.png",
        "003.png",
        "004.png",
        "000.png",
        "001.png",
        "8.JPG",
    ]
    assert image_names(rows, "image")[-1] == str(tmp_path / "dog" / "more" / "8.JPG")


def test_what_lies_in_a_hidden_folder_of_a_class_is_none_of_it(tmp_path: Path) -> None:
    tree(tmp_path, {"dog": 2, "cat": 1})
    tree(tmp_path / "cat", {".ipynb_checkpoints": 2}, first=3)
    assert labels(open_images(str(tmp_path)).splits["train"]) == ["cat", "dog", "dog"]


def test_files_that_are_no_known_images_are_said_to_be_ignored(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    tree(tmp_path, {"dog": 2, "cat": 1})
    open_images(str(tmp_path))
    assert not caplog.messages
    for name in ("dog/a.jfif", "dog/b.JFIF", "cat/c.avif", "cat/d", "cat/.hidden.jp2"):
        (tmp_path / name).touch()
    open_images(str(tmp_path))
    said = f"Reading 3 images of {tmp_path}; ignoring 4 other files (endings: .avif, .jfif, none)"
    assert caplog.messages == [said]


def test_splits_on_top_may_lack_classes_and_labels(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    tree(tmp_path / "val", {"c": 2, "b": 1}, first=10)
    (tmp_path / "test").mkdir()
    noise(20).save(tmp_path / "test" / "x.png")
    splits = open_images(str(tmp_path)).splits
    assert labels(splits["val"]) == ["b", "c", "c"]
    assert splits["test"].column_names == ["image"]


def test_a_class_may_be_called_as_a_split_is(tmp_path: Path) -> None:
    tree(tmp_path, {"train": 2, "car": 1})
    assert labels(open_images(str(tmp_path)).splits["train"]) == ["car", "train", "train"]


def test_all_classes_may_have_such_a_word_in_their_names(tmp_path: Path) -> None:
    tree(tmp_path, {"training_shoe": 2, "test_tube": 1})
    assert labels(open_images(str(tmp_path)).splits["train"]) == ["test_tube", "training_shoe", "training_shoe"]


def test_the_identity_changes_with_a_file(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 1, "b": 1})
    before = open_images(str(tmp_path)).identity
    assert open_images(str(tmp_path)).identity == before
    noise(7, 9, 9).save(tmp_path / "a" / "000.png")
    assert open_images(str(tmp_path)).identity != before


def png(number: int) -> bytes:
    file = io.BytesIO()
    noise(number).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["images", "structs", "bytes"])
def test_parquet_with_images_is_read_whatever_says_that_they_are_some(tmp_path: Path, kind: str) -> None:
    cells: list[Any] = [png(n) if kind == "bytes" else {"bytes": png(n), "path": None} for n in range(4)]
    of_images = {"images": Image(), "structs": {"bytes": Value("binary"), "path": Value("string")}}
    features = {"picture": of_images.get(kind, Value("binary")), "digit": ClassLabel(names=["x", "y"])}
    rows = Dataset.from_dict({"picture": cells, "digit": [0, 1, 0, 1]}, Features(features))
    if kind == "structs":  # without the metadata of `datasets` about columns
        rows.to_pandas().to_parquet(tmp_path / "train.parquet")
    else:
        rows.to_parquet(tmp_path / "train.parquet")
    opened = open_images(str(tmp_path / "train.parquet"))
    rows = opened.splits["train"]
    assert find_image_column(rows, "x", None) == "picture"
    assert find_label_column(rows, "x", None) == (None if kind == "structs" else "digit")
    image = rows.cast_column("picture", Image())[2]["picture"]
    assert np.array_equal(np.asarray(image), np.asarray(noise(2)))
    assert image_names(rows, "picture") == ["0", "1", "2", "3"]
    assert open_images(str(tmp_path)).splits.keys() == {"train"}


def test_columns_are_found_or_named() -> None:
    images = {"a": Image(), "b": Image(), "label": Value("int64"), "text": Value("string")}
    rows = Dataset.from_dict({name: [] for name in images}, Features(images))
    assert find_image_column(rows, "x", "b") == "b"
    assert find_label_column(rows, "x", None) == "label"
    with pytest.raises(ValueError, match=r"^data.image must be one of a, b in x, but is not given$"):
        find_image_column(rows, "x", None)
    with pytest.raises(ValueError, match=r"^data.image must be a column of images in x \(a, b\), but is 'text'$"):
        find_image_column(rows, "x", "text")
    with pytest.raises(ValueError, match=r"^data.label must be one of a, b, label, text in x, but is 'class'$"):
        find_label_column(rows, "x", "class")
    with pytest.raises(ValueError, match=r"but x has no column of images among label, text$"):
        find_image_column(rows.remove_columns(["a", "b"]), "x", None)


def test_what_is_none_of_the_layouts_is_told_all_of_them(tmp_path: Path) -> None:
    layouts = re.escape(LAYOUTS)
    (tmp_path / "x.zip").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"^data.path must be {layouts}, but is \S+x.zip, a file of another kind$"):
        open_images(str(tmp_path / "x.zip"))
    with pytest.raises(ValueError, match=rf"^data.path must be {layouts}, but \S+empty holds no image \(.png, "):
        open_images(str(tmp_path / "empty"))
    with pytest.raises(
        FileNotFoundError, match=rf"^data.path must be {layouts}, but is \S+absent, which does not exis"
    ):
        open_images(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=rf"^data.path must be {layouts}, but is 'no/where' \(subset None\): "):
        open_images("no/where")


def test_folders_that_say_two_things_or_nothing_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "c").mkdir()
    with pytest.raises(
        ValueError, match=r"^data.path must hold an image in the folder of each class, but \S+c has non"
    ):
        open_images(str(tmp_path))
    noise(3).save(tmp_path / "loose.png")
    with pytest.raises(
        ValueError, match=r"either in a folder for each class or in none, but \S+ has both loose.png and"
    ):
        open_images(str(tmp_path))


@pytest.mark.parametrize("odd", ["samples", "testB"])
def test_another_folder_beside_splits_does_not_make_classes_of_them(tmp_path: Path, odd: str) -> None:
    for first, split in enumerate(("train", "val")):
        tree(tmp_path / split, {"cat": 1, "dog": 1}, first=2 * first)
    tree(tmp_path, {odd: 1}, first=9)
    message = (
        f"data.path must hold a folder for each split or for each class, but {tmp_path} has both train with folders of "
        f"its own and {odd}, which is no split; move that elsewhere"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        open_images(str(tmp_path))
