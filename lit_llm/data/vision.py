"""Image classification: scikit-learn's digits, MNIST, and any data set of labelled images."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Image
from jaxtyping import UInt8
from torch import Tensor

from lit_llm.data.cache import cache_folder, cache_name
from lit_llm.data.examples import ExampleData
from lit_llm.data.image_augmentation import ImageAugmentation
from lit_llm.data.image_cache import READING, ImageCache, build_image_cache
from lit_llm.data.image_collation import ImageCollation
from lit_llm.data.image_processor import ImageProcessor
from lit_llm.data.image_sources import DIGITS, find_image_column, find_label_column, image_names, open_images
from lit_llm.data.table_files import choose_splits
from lit_llm.data.tables import Columns, Split
from lit_llm.ranges import require_at_least
from lit_llm.wording import listed

log = logging.getLogger(__name__)

PLACE, CONTENT = "place in the cache", "hash of the pixels"
"""Columns added to a table of images: the index of each decoded image in the cache, and a hash of its pixels."""


class VisionData(ExampleData):
    """Labelled images.

    Images are decoded once, on all cores, into a memory-mapped file from which whole batches are gathered, so a data
    set may be larger than memory. Images of mixed sizes are scaled until they cover `image_size`, and cropped to the
    centre. By default, all images are read in colour if any has colour.

    A network that starts from a model directory, a run or a checkpoint reads images as it did there: normalisation and,
    unless they are given, `image_size` and `channels` are taken from there.

    Args:
        path: `sklearn-digits` (1,797 images of 8 × 8 pixels, a fifth of them for testing), a data set on the hub such
            as `ylecun/mnist`, a folder in the hub's layout, Parquet (a file or a folder), or a folder of images with
            one folder per class, optionally inside `train`, `validation` and `test`. For predictions, class folders
            are optional. A lone table is split by its column `split` if that names splits.
        subset: Configuration of a hub data set.
        image: Column of the images; optional if there is one obvious choice.
        label: Column of the labels; optional likewise.
        image_size: Height and width in pixels. Default: those of the images, or 224 if they differ.
        channels: 1 for grey, 3 for colour. Default: 1 if no image has colour, else 3.
        normalize: Subtract the mean of each channel over the training images and divide by its standard deviation;
            otherwise intensities are from 0 to 1.
        batch_size: Images per batch and device.
        validation_fraction: Fraction of the training split to validate on if the source has no validation split: the
            same fraction of each class, chosen by a hash of the pixels. 0 for none.
        test_fraction: The same for a test split; also applies if the source's own test split has no labels, which is
            then only used for predictions.
        max_examples: Train on at most this many images, drawn with the seed in proportion to the classes.
        labels_per_class: Keep the labels of only this many training images per class, drawn with the seed; the rest
            become unlabelled, like those of a split called `unlabelled`.
        unlabelled_ratio: For semi-supervised training: number of unlabelled images per labelled one in a batch, each
            once weakly and once strongly augmented (see `ImageAugmentation`). Training rows whose label is missing are
            unlabelled. An epoch is one pass over the unlabelled ones; labelled ones are repeated as needed. 0 ignores
            the unlabelled ones, and refuses a table with missing labels.
        balance_classes: Draw each class equally often; not to be combined with an objective's `class_weights`.
        augmentation: Augmentation of training images, different in each epoch.
        broken: What to do with images that cannot be read: `refuse` the data, or `skip` them and report which.
        seed: Seed of the order of images and of the augmentation.

    Raises:
        ValueError: When no images are found, one is broken, a label is missing or not seen in training, or there are
            too few images.

    Example:
        >>> data = VisionData(batch_size=8)
        >>> data.prepare_data(); data.setup("fit")
        >>> data.image_shape, data.num_classes, {name: len(split) for name, split in data.splits.items()}
        ((1, 8, 8), 10, {'train': 1295, 'validation': 142, 'test': 360})
        >>> next(iter(data.train_dataloader()))["pixel_values"].shape
        torch.Size([8, 1, 8, 8])
    """

    def __init__(
        self,
        path: str = DIGITS,
        subset: str | None = None,
        image: str | None = None,
        label: str | None = None,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        normalize: bool = True,
        batch_size: int = 64,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
        max_examples: int | None = None,
        labels_per_class: int | None = None,
        unlabelled_ratio: int = 0,
        balance_classes: bool = False,
        augmentation: ImageAugmentation | None = None,
        broken: Literal["refuse", "skip"] = "refuse",
        seed: int = 0,
    ) -> None:
        require_at_least(1, "data.", image_size=image_size)
        super().__init__(
            path=path,
            subset=subset,
            batch_size=batch_size,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            max_examples=max_examples,
            labels_per_class=labels_per_class,
            unlabelled_ratio=unlabelled_ratio,
            balance_classes=balance_classes,
            augmentation=augmentation,
            seed=seed,
        )
        self.given, self.image_size, self.channels = {"image": image, "label": label}, image_size, channels
        self.normalize, self.broken = normalize, broken
        self.cache: ImageCache | None = None
        self._known: ImageProcessor | None = None
        self._processor: ImageProcessor | None = None

    # Properties read by objectives, callbacks and model directories.

    monitor: tuple[str, str] | None = None
    """The headline metric; `None` is the objective's."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image. Like all these properties, available from `setup` on."""
        return self._open_processor().shape

    @property
    def normalization(self) -> dict[str, list[float]]:
        """What is subtracted from each channel (`mean`) and what it is divided by (`std`), for pixels from 0 to 1."""
        processor = self._open_processor()
        return {"mean": list(processor.mean), "std": list(processor.std)}

    @property
    def image_processor(self) -> dict[str, Any]:
        """How images are read, in the form of a model directory's `preprocessor_config.json`."""
        return self._open_processor().to_hf()

    @property
    def manifest(self) -> dict[str, Any]:
        """What the data is and how it was made."""
        return {
            "path": self.path,
            "subset": self.subset,
            "columns": {"image": self._image, "label": self.columns.label},
            "class_names": self.class_names,
            "image_shape": list(self.image_shape),
            "normalization": self.normalization,
            "splits": {name: {"examples": len(split)} for name, split in self.splits.items()},
        }

    def images(self, split: str, rows: list[int]) -> UInt8[Tensor, "batch channels height width"]:
        """Some of the decoded images, not normalised, from 0 to 255."""
        return self._read(split).images(np.asarray(rows, dtype=np.int64))

    def texts(self, split: str, rows: list[int]) -> list[dict[str, Any]]:
        """The source's other columns for some of the images; `image` is the path, or the number of the row there."""
        kept = [name for name in self.splits[split].rows.column_names if name not in (PLACE, CONTENT)]
        table = self.splits[split].rows.select_columns(kept)
        return [table[row] for row in rows]

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Decodes the images; when predicting, this waits until a checkpoint has given their size."""
        if not self._predicting:
            self._open_processor()

    def setup(self, stage: str) -> None:
        """Checks the data; fixes how images are read while the network still knows what it starts from."""
        super().setup(stage)
        if not self._predicting:
            self._open_processor()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to read images and name classes without this data."""
        return {"image_processor": self.image_processor, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Reads images as the checkpoint does; refuses a checkpoint with other classes.

        Raises:
            ValueError: When training would resume with images of another shape, or classes differ.
        """
        processor = ImageProcessor.from_hf(state_dict["image_processor"])
        if self._stage == "fit" and self.image_shape != processor.shape:
            raise ValueError(
                f"data.image_size and data.channels must be the checkpoint's, {processor}, but are "
                f"{self._open_processor()} in {self.path}"
            )
        if self.cache is not None and self.cache.shape != processor.shape:
            self.__dict__.pop("splits", None)
        self._known = self._processor = processor
        self._readable = {}
        super().load_state_dict(state_dict)

    # How images are found and read.

    def _find_splits(self) -> dict[str, Split]:
        tables = open_images(self.path, self.subset)
        chosen = choose_splits(tables.splits, self.path)
        first = chosen["train"] if "train" in chosen else next(iter(chosen.values()))
        self._image = find_image_column(first, self.path, self.given["image"])
        label = self.given["label"] or self._known_columns(first).get("label")
        if self._predicting and (label or self._trained_on):  # no other column can be the label
            label = label if label in first.column_names else None
        else:
            label = find_label_column(first, self.path, label)
        self.columns = Columns(CONTENT, None, label)
        if label is None and not self._predicting:
            raise ValueError(
                f"data.path must tell the classes of images, by a folder for each or a column data.label, but "
                f"{self.path} has none"
            )
        self.tables = self._decoded(chosen, tables.identity)
        found = dict(self.tables)
        unlabelled = found.pop("unlabelled", None) if "train" in found else None
        whole = self._standing_alone(found) or self._whole_to_predict(found, label)
        return whole or self._labelled(found, unlabelled)

    def _decoded(self, tables: dict[str, Dataset], identity: str) -> dict[str, Dataset]:
        """The tables with indices into the cache and names instead of encoded images, without broken images."""
        known, size, channels = self._known, None, None
        if known is None:
            known, channels = self._processor_of_network(), self.channels
            size = self.image_size and (self.image_size, self.image_size)
        size, channels = size or (known and known.shape[1:]), channels or (known and known.shape[0])
        what = {"images": identity, "reading": READING, "column": self._image, "splits": list(tables)}
        folder = cache_folder() / "images" / cache_name(**what, size=size, channels=channels)
        encoded = {
            split: rows.cast_column(self._image, Image(decode=False)).select_columns([self._image])
            for split, rows in tables.items()
        }
        self.cache = ImageCache.open(folder) or build_image_cache(folder, encoded, size, channels)
        shape = self.cache.shape
        same = folder.with_name(cache_name(**what, size=shape[1:], channels=shape[0]))
        with contextlib.suppress(OSError):  # so that a run that names the size found here, such as `predict`, finds it
            same.symlink_to(folder.name)
        found = {}
        for split, rows in tables.items():
            places, names = self.cache.places(split), image_names(rows, self._image)
            rows = rows.add_column(PLACE, places.tolist())
            rows = rows.add_column(CONTENT, list(map(str, self.cache.contents[places])))
            rows = rows.remove_columns([name for name in {self._image, "image"} if name in rows.column_names])
            rows = rows.add_column("image", names)
            found[split] = rows.select(self._whole(split, names))
        return found

    def _whole(self, split: str, names: list[str]) -> np.ndarray:
        """Indices of a split's rows whose images can be read."""
        broken = {row: reason for of_split, row, reason in self.cache.manifest["broken"] if of_split == split}
        if not broken:
            return np.arange(len(names))
        which = listed(names[row] for row in broken)
        if self.broken == "refuse":
            raise ValueError(
                f"data.path must hold images that can be read, but {which} of the {split} split of {self.path} cannot: "
                f"{next(iter(broken.values()))}; set data.broken to skip to go without"
            )
        log.warning(f"Skipped {len(broken)} broken of {len(names):,} images of the {split} split: {which}")
        return np.setdiff1d(np.arange(len(names)), list(broken))

    def _processor_of_network(self) -> ImageProcessor | None:
        """How images were read for the weights that the network starts from."""
        stored = getattr(getattr(self.trainer, "lightning_module", None), "image_processor", None)
        return stored and ImageProcessor.from_hf(stored)

    def _open_processor(self) -> ImageProcessor:
        splits = self.splits
        if self._processor is None:
            shape, known = self.cache.shape, self._known or self._processor_of_network()
            mean, std = [0.0] * shape[0], [1.0] * shape[0]
            if known is not None and len(known.mean) == shape[0] and (self.normalize or self._known):
                mean, std = known.mean, known.std
            elif self.normalize:
                split = splits["train"] if "train" in splits else next(iter(splits.values()))
                mean, std = self.cache.moments(np.array(split.column(PLACE)))
            self._processor = ImageProcessor(shape, mean, std)
        return self._processor

    def _make_readable(self, split: Split) -> ImageCollation:
        processor = self._open_processor()
        places = np.array(split.column(PLACE))
        return ImageCollation(self.cache.pixels, places, split.labels, self.num_classes, processor.mean, processor.std)

    def _views(self) -> tuple[Any, Any, Any]:
        if self.augmentation is None:
            return None, None, None
        return self.augmentation.weak, self.augmentation.weak, self.augmentation.without_mixing
