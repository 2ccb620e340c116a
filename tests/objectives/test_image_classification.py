"""Classification of images: mixed labels, image shapes that must match, and fine-tuning."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_llm.adaptation import (
    Adaptation,
    DoRA,
    FrozenLayers,
    GradualUnfreezing,
    HeadOnly,
    LayerDecay,
    LoRA,
    RSLoRA,
)
from lit_llm.checkpoints import load_model, read_adapted, save_model
from lit_llm.models.cnn import CNN
from lit_llm.models.lenet import LeNet
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.semi_supervised import FixMatch
from tests.image_batches import EFFICIENTNET, RESNET, VIT, Images
from tests.objectives.test_classification import trainer
from tests.writing import exactly

NETWORKS = {
    "cnn": functools.partial(CNN, dropout=0.0, channel_dropout=0.0),
    "lenet": LeNet,
    "vit": functools.partial(PretrainedClassifier, config=VIT),
    "resnet": functools.partial(PretrainedClassifier, config=RESNET),
    "efficientnet": functools.partial(PretrainedClassifier, config=EFFICIENTNET),
}
ADAPTATIONS = [HeadOnly(), FrozenLayers(1), LayerDecay(), GradualUnfreezing(), LoRA(2), DoRA(2), RSLoRA(2)]
ADAM = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)


def fitted(tmp_path: Path, network: Any, data: Images, steps: int = 1, **options: Any) -> Classification:
    made = Classification(network, ADAM, **options)
    trainer(tmp_path, max_steps=steps, max_epochs=-1).fit(made, datamodule=data)
    return made


@pytest.mark.parametrize("network", ["cnn", "lenet", "vit", "resnet"])
def test_a_network_learns_images_of_the_datas_shape(network: str, tmp_path: Path) -> None:
    data = Images(image_shape=(2, 8, 12))
    made = fitted(tmp_path, NETWORKS[network], data, 60 if network == "vit" else 30)
    run = trainer(tmp_path)
    run.test(made, datamodule=data, verbose=False)
    assert run.callback_metrics["test/accuracy"] > 0.9
    assert made.network.class_names == ["digit 0", "digit 1", "digit 2"]
    assert tuple(made.network.image_shape) in [(2, 8, 12), (2, None, None)]


@pytest.mark.parametrize("weights", [None, "balanced"])
def test_the_loss_of_mixed_images_is_that_of_their_shares(weights: Any, tmp_path: Path) -> None:
    data = Images(mixed=True)
    data.class_counts = [12, 6, 3]
    made = fitted(tmp_path, NETWORKS["cnn"], data, label_smoothing=0.1, class_weights=weights)
    batch = data.batch("train", [0, 1, 2, 5])
    assert batch["labels"].shape == (4, 3)
    weight = torch.tensor([1.0, 2.0, 4.0]) if weights else torch.ones(3)
    total, count = made.loss(batch)
    shares = batch["labels"] * weight  # label smoothing applies to each class of a mixture as to an unmixed image
    shares = 0.9 * shares + 0.1 * shares.sum(dim=1, keepdim=True) / 3
    expected = -(shares * made.logits(batch).log_softmax(-1)).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(count, (batch["labels"] * weight).sum())


@pytest.mark.parametrize("weights", [None, "balanced"])
def test_mixed_images_are_learnt_by_a_network_of_more_classes_as_whole_ones_are(weights: Any, tmp_path: Path) -> None:
    made = fitted(tmp_path, NETWORKS["cnn"], Images(mixed=True), num_classes=5, class_weights=weights).eval()
    batch = Images().batch("train", [0, 1, 5])
    soft = batch | {"labels": F.one_hot(batch["labels"], 3).float()}
    torch.testing.assert_close(made.loss(soft), made.loss(batch))


@pytest.mark.parametrize("weights", [None, "balanced"])
def test_mixed_images_are_learnt_by_a_network_in_16_bits(weights: Any, tmp_path: Path) -> None:
    read = []
    made = Classification(NETWORKS["cnn"], ADAM, label_smoothing=0.1, class_weights=weights)
    made.on_train_batch_start = lambda batch, batch_idx: read.append(batch)
    trainer(tmp_path, max_steps=1, precision="bf16-true").fit(made, datamodule=Images(mixed=True))
    assert read[0]["pixel_values"].dtype == torch.bfloat16
    assert read[0]["labels"].dtype == torch.float32


def test_shares_that_are_all_of_one_class_are_that_class(tmp_path: Path) -> None:
    data = Images()
    made = fitted(tmp_path, NETWORKS["cnn"], data, class_weights="balanced", label_smoothing=0.1).eval()
    batch = data.batch("train", [0, 1, 5])
    soft = batch | {"labels": F.one_hot(batch["labels"], 3).float()}
    torch.testing.assert_close(made.loss(soft), made.loss(batch))


@pytest.mark.parametrize("adaptation", ADAPTATIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("network", ["vit", "resnet", "efficientnet", "cnn"])
def test_every_way_to_fine_tune_goes_with_every_kind_of_network(
    network: str, adaptation: Adaptation, tmp_path: Path
) -> None:
    made = Classification(NETWORKS[network], ADAM, adaptation=adaptation)
    run = trainer(tmp_path, max_steps=4, max_epochs=-1, enable_checkpointing=False)
    run.fit(made, datamodule=Images())
    run.save_checkpoint(tmp_path / "x.ckpt")
    again, _ = read_adapted(tmp_path / "x.ckpt")
    adaptation.finish(again)
    plain = NETWORKS[network](3)
    plain.read_images_of((1, 8, 8))
    assert again.state_dict().keys() == plain.state_dict().keys()
    images = Images().batch("validation", [0, 1, 2])["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(pixel_values=images), made.eval().network(pixel_values=images), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(("network", "layers"), [("resnet", 3 * 2), ("efficientnet", 3 * 4), ("vit", 3 * 6)])
def test_adapters_stand_beside_convolutions_but_not_those_by_groups(network: str, layers: int) -> None:
    made = NETWORKS[network](3)
    made.read_images_of((1, 8, 8))
    LoRA(2).prepare(made)
    adapted = [module for module in made.modules() if hasattr(module, "lora_A")]
    assert len(adapted) >= layers
    assert not any(getattr(module.get_base_layer(), "groups", 1) > 1 for module in adapted)


@pytest.mark.parametrize("adaptation", [HeadOnly(cache_features=False), LoRA(2)])
def test_frozen_batch_normalisations_keep_their_statistics(adaptation: Adaptation, tmp_path: Path) -> None:
    start = PretrainedClassifier(3, config=RESNET)
    start.read_images_of((1, 8, 8))
    save_model(tmp_path / "start", start)
    network = functools.partial(PretrainedClassifier, path=str(tmp_path / "start"))
    made = Classification(network, ADAM, adaptation=adaptation)
    trainer(tmp_path, max_steps=4, max_epochs=-1, val_check_interval=1).fit(made, datamodule=Images())
    before = {name: b for name, b in start.named_buffers() if "running" in name}
    after = {name.replace(".base_layer", ""): b for name, b in made.network.named_buffers() if "running" in name}
    assert before
    assert all(torch.equal(after[name], statistic) for name, statistic in before.items())
    assert not torch.equal(start.model.classifier[1].weight, made.network.model.classifier[1].weight)


def test_cached_features_of_images_train_as_those_made_at_each_step(tmp_path: Path) -> None:
    heads = []
    for cached in (True, False):
        torch.manual_seed(0)
        made = Classification(NETWORKS["resnet"], ADAM, adaptation=HeadOnly(cached))
        trainer(tmp_path, max_steps=6, max_epochs=-1).fit(made, datamodule=Images())
        heads.append(made.network.model.classifier[1].weight)
    torch.testing.assert_close(*heads)


def test_weights_of_other_images_are_refused_with_both(tmp_path: Path) -> None:
    save_model(tmp_path / "model", LeNet(3, 1, 8))
    message = (
        "data must have images of 1 channel of 8 x 8, which the LeNet was made for, but has images of 3 channels of 12 "
        "x 12; set data.channels to 1 and data.image_size to 8"
    )
    made = Classification(weights=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=exactly(message)):
        trainer(tmp_path, max_steps=1).fit(made, datamodule=Images(image_shape=(3, 12, 12)))
    fits = Classification(weights=str(tmp_path / "model"))
    trainer(tmp_path, max_steps=1).fit(fits, datamodule=Images())
    assert type(fits.network) is LeNet


@pytest.mark.parametrize("network", ["lenet", "vit"])
def test_a_checkpoint_of_other_images_is_refused_with_both(network: str, tmp_path: Path) -> None:
    made = Classification(NETWORKS[network])
    run = trainer(tmp_path, max_steps=1)
    run.fit(made, datamodule=Images())
    run.save_checkpoint(tmp_path / "x.ckpt")
    message = (
        "data must have images of the channels, height and width that the checkpoint's network was made for, [1, 8, 8], "
        "but has [3, 12, 12]; set data.channels and data.image_size"
    )
    again = Classification(NETWORKS[network])
    with pytest.raises(ValueError, match=exactly(message)):
        trainer(tmp_path, max_steps=2).fit(
            again, datamodule=Images(image_shape=(3, 12, 12)), ckpt_path=str(tmp_path / "x.ckpt")
        )


@pytest.mark.parametrize("kind", [Classification, FixMatch])
@pytest.mark.parametrize("network", ["lenet", "vit"])
def test_a_checkpoint_says_what_images_are_tested_and_predicted(
    network: str, kind: type[Classification], tmp_path: Path
) -> None:
    made, data = kind(NETWORKS[network], ADAM), PartlyLabelled(image_shape=(2, 8, 12))
    run = trainer(tmp_path, max_steps=2)
    run.fit(made, datamodule=data)
    run.save_checkpoint(tmp_path / "x.ckpt")
    run.test(made, data, verbose=False)
    for shape_is_known in (True, False):
        data.image_shape = (2, 8, 12) if shape_is_known else None
        again = trainer(tmp_path)
        again.test(kind(NETWORKS[network], num_classes=3), data, ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
        assert again.callback_metrics["test/loss"] == run.callback_metrics["test/loss"]


def test_a_checkpoint_brings_its_own_shape_and_names(tmp_path: Path) -> None:
    made = Classification(NETWORKS["cnn"])
    run = trainer(tmp_path, max_steps=1)
    run.fit(made, datamodule=Images(image_shape=(2, 9, 12)))
    run.save_checkpoint(tmp_path / "x.ckpt")
    network, _ = load_model(tmp_path / "x.ckpt")
    assert network.image_shape == (2, 9, 12)
    assert network.class_names == ["digit 0", "digit 1", "digit 2"]


class PartlyLabelled(Images):
    """Adds unlabelled images to each training batch; the strong augmentation mirrors them."""

    def batch(self, split: str, rows: list[int]) -> dict[str, Any]:
        found = super().batch(split, rows)
        if split == "train":
            weak = super().batch(split, [50 + row for row in rows for _ in range(2)])
            found |= {"unlabelled": weak, "unlabelled_strong": weak | {"pixel_values": weak["pixel_values"].flip(-1)}}
        return found


def test_unlabelled_images_are_learnt_from_with_batch_normalisation(tmp_path: Path) -> None:
    data = PartlyLabelled()
    made = FixMatch(LeNet, ADAM, threshold=0.6, decay=0.9)
    run = trainer(tmp_path, max_steps=20, max_epochs=-1)
    run.fit(made, datamodule=data)
    assert made.take_train_metrics()["train/confident"] > 0
    run.test(made, datamodule=data, verbose=False)
    assert run.callback_metrics["test/accuracy"] > 0.9
    norms = [m for m in made.network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.training for norm in norms)  # predicting as teacher has not changed the mode
