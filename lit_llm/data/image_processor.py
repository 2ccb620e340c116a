"""Preprocessing of a network's images, as stored in a model directory's `preprocessor_config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageProcessor:
    """Size, channels and normalisation of a network's images.

    Attributes:
        shape: Channels, height and width.
        mean: Value subtracted from each channel, for pixels from 0 to 1.
        std: Value that each channel is then divided by.

    Example:
        >>> processor = ImageProcessor((1, 28, 28), [0.13], [0.31])
        >>> ImageProcessor.from_hf(processor.to_hf()) == processor, str(processor)
        (True, '28 × 28 pixels of 1 channel')
    """

    shape: tuple[int, int, int]
    mean: list[float]
    std: list[float]

    def __str__(self) -> str:
        """The shape in words."""
        channels, height, width = self.shape
        return f"{height} × {width} pixels of {channels} channel{'s' * (channels > 1)}"

    def to_hf(self) -> dict[str, Any]:
        """A config for transformers.

        If `shape` is square, its image processor resizes and crops like `image_cache.read_image`.
        """
        channels, height, width = self.shape
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": min(height, width)},
            "resample": 2,  # bilinear
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_convert_rgb": channels == 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ImageProcessor:
        """Reads a config of transformers, except for how images are resized.

        Raises:
            ValueError: When it has no size, or wants the channels in another order.
        """
        if config.get("do_flip_channel_order"):
            raise ValueError(
                "do_flip_channel_order must be false in preprocessor_config.json, as images are read as RGB, but is "
                "true; reverse the channels that the network's first weights read, and set it to false"
            )
        size = (config.get("do_center_crop") and config.get("crop_size")) or config.get("size")
        if isinstance(size, dict):
            edge = size.get("shortest_edge")
            size = (size.get("height", edge), size.get("width", edge))
        elif not isinstance(size, list | tuple):
            size = (size, size)
        if not all(isinstance(side, int) for side in size):
            raise ValueError(f"preprocessor_config.json must say a size in pixels, but says {config.get('size')}")
        mean, std = [0.0] * 3, [1.0] * 3
        if config.get("do_normalize", True):
            mean, std = config.get("image_mean") or mean, config.get("image_std") or std
        # Mean and std may be for pixels multiplied by another factor and lowered by 1: convert them.
        factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
        shift = 1.0 if config.get("rescale_offset") else 0.0
        if factor != 1 / 255 or shift:
            mean = [(each + shift) / (255 * factor) for each in mean]
            std = [each / (255 * factor) for each in std]
        return cls((len(mean), *size), list(mean), list(std))
