"""Image classifiers of transformers: blocks, features, image shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_llm.blocks import Block, depths
from lit_llm.checkpoints import load_model, save_model
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from tests.examples import BERT
from tests.image_batches import EFFICIENTNET, RESNET, VIT
from tests.models.test_pretrained_classifier import stirred
from tests.writing import exactly

CONFIGS = {"vit": VIT, "resnet": RESNET, "efficientnet": EFFICIENTNET}
NAMES = {"vit": "ViTLayer", "resnet": "ResNetStage", "efficientnet": "EfficientNetBlock"}
KEPT = {"vit": {"first_hidden_state"}, "resnet": {"pooler_output"}, "efficientnet": {"pooler_output"}}
kinds = pytest.mark.parametrize("kind", CONFIGS)


def two_parts(kind: str) -> dict[str, Any]:
    size = {name: VIT[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    of_texts = {**size, "num_hidden_layers": 1, "vocab_size": 20}
    return {"model_type": kind, "vision_config": {**of_texts, "patch_size": 4}, "text_config": of_texts}


def made(kind: str, shape: tuple[int, int, int] = (1, 8, 8)) -> PretrainedClassifier:
    network = PretrainedClassifier(3, config=CONFIGS[kind])
    network.read_images_of(shape)
    return network


@kinds
def test_fresh_weights_are_made_for_the_datas_images(kind: str, tmp_path: Path) -> None:
    network = stirred(made(kind, (2, 12, 8)))
    images = torch.randn(4, 2, 12, 8)
    said = network(pixel_values=images)
    assert said.shape == (4, 3)
    assert network.config.num_channels == 2
    save_model(tmp_path, network)
    torch.testing.assert_close(load_model(tmp_path)[0](pixel_values=images), said, atol=1e-5, rtol=1e-5)


@kinds
def test_its_repeated_layers_are_blocks_between_the_first_layer_and_the_head(kind: str) -> None:
    network = made(kind)
    blocks = {type(module).__name__ for module in network.modules() if isinstance(module, Block)}
    assert blocks == {NAMES[kind]}
    found, top = depths(network)
    assert set(found.values()) == set(range(top + 1))
    assert {name for name, p in network.named_parameters() if found[p] == top} == {
        name for name, _ in network.named_parameters() if "classifier" in name
    }


@kinds
@torch.no_grad()
def test_features_and_head_are_the_whole(kind: str) -> None:
    network, images = stirred(made(kind)), torch.randn(4, 1, 8, 8)
    features = network.features(pixel_values=images)
    assert set(features) == KEPT[kind]
    torch.testing.assert_close(network.classify(features), network(pixel_values=images))


@kinds
def test_convolutions_are_kept_with_channels_last(kind: str) -> None:
    weights = [p for p in made(kind, (3, 8, 8)).parameters() if p.ndim == 4]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize(
    ("kind", "refused", "wanted"),
    [
        ("vit", (3, 8, 8), "1 channel of 8 x 8"),
        ("vit", (1, 12, 12), "1 channel of 8 x 8"),
        ("resnet", (3, 8, 8), "1 channel of any size"),
    ],
)
@pytest.mark.parametrize("by_path", [True, False])
def test_weights_of_other_images_are_refused_with_both(
    kind: str, refused: tuple[int, int, int], wanted: str, by_path: bool, tmp_path: Path
) -> None:
    save_model(tmp_path, made(kind))
    network = PretrainedClassifier(3, str(tmp_path)) if by_path else load_model(tmp_path)[0]
    network.read_images_of((1, 8, 8))
    name, (channels, height, width) = type(network.model).__name__, refused
    remedy = "" if "any" in wanted else " and data.image_size to 8"
    plural = "s" if channels > 1 else ""
    message = (
        f"data must have images of {wanted}, which the {name} was made for, but has images of {channels} "
        f"channel{plural} of {height} x {width}; set data.channels to 1{remedy}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        network.read_images_of(refused)


def test_weights_that_know_no_places_read_images_of_any_size(tmp_path: Path) -> None:
    save_model(tmp_path, made("resnet"))
    network = PretrainedClassifier(3, str(tmp_path))
    network.read_images_of((1, 30, 20))
    assert network(pixel_values=torch.randn(2, 1, 30, 20)).shape == (2, 3)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_images_of_a_network_that_was_trained_on_texts_too_are_those_of_its_part_for_them(kind, tmp_path) -> None:
    network = PretrainedClassifier(3, config=two_parts(kind))
    network.read_images_of((1, 8, 8))
    assert network(pixel_values=torch.randn(2, 1, 8, 8)).shape == (2, 3)
    save_model(tmp_path, network)
    again = PretrainedClassifier(3, str(tmp_path))
    again.read_images_of((1, 8, 8))
    assert again.image_shape == load_model(tmp_path)[0].image_shape == (1, 8, 8)
    with pytest.raises(ValueError, match="data must have images of 1 channel of 8 x 8"):
        again.read_images_of((3, 8, 8))


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (
            two_parts("clip"),
            (3, 8, 4),
            "data must have images as high as wide for a CLIPForImageClassification, but has images of 8 x 4; set "
            "data.image_size to one number",
        ),
        (VIT, (1, 10, 8), "patch_size must divide the images' 10 x 8, but is 4"),
        (BERT, (1, 8, 8), "network must read images, but is a BertForSequenceClassification, which reads input_ids"),
    ],
)
def test_images_that_a_network_cannot_read_are_refused(
    config: dict[str, Any], shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        PretrainedClassifier(3, config=config).read_images_of(shape)
