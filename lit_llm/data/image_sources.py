"""Sources of images: embedded digits, hub data sets, Parquet, folders with one folder per class."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, Value

from lit_llm.data.cache import stamps
from lit_llm.data.table_files import HUB_NAME, SPLIT_WORD, TABLE_FORMATS, in_hub_layout, refuse_saved, split_kind
from lit_llm.data.tables import LABELS, open_table

log = logging.getLogger(__name__)

DIGITS = "sklearn-digits"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
COLUMNS = ("image", "img", "picture", "photo", "pixel_values")
LAYOUTS = (
    f"{DIGITS}, a hub data set, Parquet with a column of images, or a folder of images with a folder for each class "
    f"(beneath train, validation and test, or not)"
)
DIGITS_TO_TEST_ON = 360


class ImageTables(NamedTuple):
    """Tables of images.

    Attributes:
        splits: Tables by the source's names of the splits; one column holds the images, encoded or as paths.
        identity: Text that changes whenever the images do.
    """

    splits: dict[str, Dataset]
    identity: str


def open_images(path: str, subset: str | None = None) -> ImageTables:
    """Opens images in any supported format, without decoding them.

    Args:
        path: `sklearn-digits`; a data set on the hub, or a folder in the hub's layout; a Parquet file, or a folder of
            them; a folder with one folder of images per class, optionally inside `train`, `validation` (`val`, `dev`,
            `eval`) and `test`; or a folder of images without labels.
        subset: Configuration of a hub data set, or folder beneath `path`.

    Raises:
        FileNotFoundError: When there is nothing at `path`.
        ValueError: When `path` exists but holds no images.
    """
    if path == DIGITS:
        return ImageTables(_digits(), DIGITS)
    where = Path(path).expanduser()
    if where.is_file() and where.suffix.lower() not in TABLE_FORMATS:
        raise ValueError(f"data.path must be {LAYOUTS}, but is {path}, a file of another kind")
    if not where.exists() and (where.is_absolute() or not HUB_NAME.fullmatch(path)):
        raise FileNotFoundError(f"data.path must be {LAYOUTS}, but is {path}, which does not exist")
    folder = where / subset if subset and (where / subset).is_dir() else where
    if where.is_dir() and not in_hub_layout(where) and not any(folder.glob("*.parquet")):
        refuse_saved(folder, path)
        return _image_folders(folder)
    splits = open_table(path, subset, kinds=LAYOUTS)
    # `datasets` keeps tables in cache files, whose names depend on the content.
    kept = [Path(file["filename"]) for name in sorted(splits) for file in splits[name].cache_files]
    return ImageTables(splits, stamps(kept))


def _digits() -> dict[str, Dataset]:
    """The 1,797 digits of scikit-learn; the last fifth, largely by other writers, is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    first = len(pixels) - DIGITS_TO_TEST_ON
    return {
        name: Dataset.from_dict({"image": list(pixels[part]), "label": digits.target[part].tolist()}, features)
        for name, part in {"train": slice(first), "test": slice(first, None)}.items()
    }


def _image_folders(folder: Path) -> ImageTables:
    folders = _subfolders(folder)
    if folders and _are_splits(folders):
        trees = {each.name: _classes(each) for each in folders}
    else:
        trees = {"train": _classes(folder)}
    names = sorted({name for tree in trees.values() for name in tree if name is not None})
    splits, files = {}, []
    for split, tree in trees.items():
        found = [(str(file), name) for name, members in tree.items() for file in members]
        files += [Path(file) for file, _ in found]
        columns: dict[str, list[Any]] = {"image": [file for file, _ in found]}
        features = {"image": Image(decode=False)}
        if None not in tree:
            columns["label"] = [names.index(name) for _, name in found]
            features["label"] = ClassLabel(names=names)
        splits[split] = Dataset.from_dict(columns, Features(features))
    others = [each for each in _visible(folder) if each.suffix.lower() not in SUFFIXES and each.is_file()]
    if others:
        endings = ", ".join(sorted({each.suffix.lower() or "none" for each in others}))
        log.info(
            f"Reading {len(files):,} images of {folder}; ignoring {len(others):,} other files (endings: {endings})"
        )
    return ImageTables(splits, stamps(files))


def _are_splits(folders: list[Path]) -> bool:
    """Whether all folders are splits, by name; if a name only contains a split word, one must hold classes too."""
    plain = [each for each in folders if SPLIT_WORD.fullmatch(each.name.lower()) or each.name.startswith("unlabel")]
    called = [each for each in folders if split_kind(each.name) or each.name.startswith("unlabel")]
    if len(plain) == len(folders) or (len(called) == len(folders) and any(map(_subfolders, folders))):
        return True
    if split := next(filter(_subfolders, plain), None):
        odd = next(each for each in folders if each not in called)
        raise ValueError(
            f"data.path must hold a folder for each split or for each class, but {split.parent} has both {split.name} "
            f"with folders of its own and {odd.name}, which is no split; move that elsewhere"
        )
    return False


def _classes(folder: Path) -> dict[str | None, list[Path]]:
    """The images of each class; under `None` if there are no class folders."""
    loose = _images(each for each in folder.iterdir() if not each.name.startswith("."))
    classes: dict[str | None, list[Path]] = {each.name: _images(_visible(each)) for each in _subfolders(folder)}
    if loose and classes:
        raise ValueError(
            f"data.path must hold images either in a folder for each class or in none, but {folder} has both "
            f"{loose[0].name} and the folder {next(iter(classes))}"
        )
    if not loose and not any(classes.values()):
        raise ValueError(f"data.path must be {LAYOUTS}, but {folder} holds no image ({', '.join(SUFFIXES)})")
    if empty := [name for name, files in classes.items() if not files]:
        raise ValueError(
            f"data.path must hold an image in the folder of each class, but {folder / str(empty[0])} has none; remove "
            f"the folder to go without the class"
        )
    return classes or {None: loose}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def _visible(folder: Path) -> Iterator[Path]:
    """Everything beneath a folder, except hidden files and the contents of hidden folders."""
    return (each for each in folder.rglob("*") if not any(x.startswith(".") for x in each.relative_to(folder).parts))


def _images(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES and file.is_file())


def find_image_column(rows: Dataset, path: str, image: str | None) -> str:
    """The column of the images: the named one, or the one obvious choice.

    Raises:
        ValueError: When the column is missing or holds no images, or the choice is not obvious.
    """
    names = [name for name in rows.column_names if _holds_images(rows.features[name])]
    if image is not None:
        if image not in names:
            known = ", ".join(names) or "none of its columns"
            raise ValueError(f"data.image must be a column of images in {path} ({known}), but is {image!r}")
        return image
    usual = [name for name in COLUMNS if name in names] or names
    if not usual:
        raise ValueError(
            f"data.path must be {LAYOUTS}, but {path} has no column of images among {', '.join(rows.column_names)}"
        )
    if len(usual) > 1 and usual[0] not in COLUMNS:
        raise ValueError(f"data.image must be one of {', '.join(names)} in {path}, but is not given")
    return usual[0]


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):  # images in Parquet without the features' metadata
        return "bytes" in feature
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))


def find_label_column(rows: Dataset, path: str, label: str | None) -> str | None:
    """The column of the labels: the named one, one with a usual name, or the only one of classes; else `None`.

    Raises:
        ValueError: When the named column is missing.
    """
    if label is not None:
        if label not in rows.column_names:
            raise ValueError(f"data.label must be one of {', '.join(rows.column_names)} in {path}, but is {label!r}")
        return label
    of_classes = [name for name in rows.column_names if isinstance(rows.features[name], ClassLabel)]
    usual = [name for name in LABELS if name in rows.column_names]
    return next(iter([*usual, *(of_classes if len(of_classes) == 1 else [])]), None)


def image_names(rows: Dataset, image: str) -> list[str]:
    """Name of each image: its path if the source has one, else its row number."""
    column = rows.cast_column(image, Image(decode=False)).select_columns([image]).with_format("arrow")[:][image]
    paths = pa.chunked_array([chunk.field("path") for chunk in column.chunks], pa.string()).to_pylist()
    return [path or str(row) for row, path in enumerate(paths)]
