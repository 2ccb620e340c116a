import pytest

from lit_llm.data.image_processor import ImageProcessor
from tests.writing import exactly

HALF = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"size": {"height": 24, "width": 32}}, (3, 24, 32)),
        ({"size": 24}, (3, 24, 24)),
        ({"size": {"shortest_edge": 24}}, (3, 24, 24)),
        (
            {"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": {"height": 24, "width": 20}},
            (3, 24, 20),
        ),
        ({"size": {"shortest_edge": 30}, "do_center_crop": False, "crop_size": 24}, (3, 30, 30)),
        ({"size": 8, "image_mean": [0.1], "image_std": [0.2]}, (1, 8, 8)),
    ],
)
def test_the_shape_is_found_in_what_transformers_writes(config, shape) -> None:
    assert ImageProcessor.from_hf(HALF | config).shape == shape


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "rescale_offset": True},
        {"rescale_factor": 1 / 128, "do_normalize": False},
    ],
)
def test_normalisation_comes_to_the_same_however_it_is_written(config) -> None:
    processor, pixel = ImageProcessor.from_hf(HALF | {"size": 8} | config), 200
    scaled = pixel * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else pixel
    scaled -= 1 if config.get("rescale_offset") else 0
    expected = (scaled - 0.5) / 0.25 if config.get("do_normalize", True) else scaled
    assert (pixel / 255 - processor.mean[0]) / processor.std[0] == pytest.approx(expected)


def test_a_config_without_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^preprocessor_config.json must say a size in pixels, but says None$"):
        ImageProcessor.from_hf(HALF)


def test_channels_in_another_order_are_refused() -> None:
    message = (
        "do_flip_channel_order must be false in preprocessor_config.json, as images are read as RGB, but is true; "
        "reverse the channels that the network's first weights read, and set it to false"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        ImageProcessor.from_hf(HALF | {"size": 8, "do_flip_channel_order": True})
    assert ImageProcessor.from_hf(HALF | {"size": 8, "do_flip_channel_order": False}).shape == (3, 8, 8)
