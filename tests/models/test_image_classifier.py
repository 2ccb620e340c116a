"""This package's own image classifiers: memory format, model directory, image shape."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_llm.blocks import Block, depths
from lit_llm.checkpoints import load_model, read_model, save_model
from lit_llm.models.cnn import CNN
from lit_llm.models.image_classifier import ImageClassifier
from lit_llm.models.lenet import LeNet
from lit_llm.models.mlp import MLP
from tests.writing import exactly

KINDS = [CNN, LeNet, MLP]
BLOCKS = {CNN: 3, LeNet: 3, MLP: 2}


def stirred(network: nn.Module) -> nn.Module:
    """Sets all weights and statistics far from their initial values, in evaluation mode."""
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, network.state_dict().values()):
            tensor.add_(0.2 * torch.rand_like(tensor))
    return network.eval()


@pytest.mark.parametrize("kind", KINDS)
class TestImageClassifier:
    def test_a_directory_gives_the_same_network_back(self, kind: type[ImageClassifier], tmp_path: Path) -> None:
        network = stirred(kind(3, 2, [9, 12], ["a", "b", "c"]))
        save_model(tmp_path / "model", network)
        again, tokenizer = load_model(tmp_path / "model")
        images = torch.randn(4, 2, 9, 12)
        assert type(again) is kind
        assert tokenizer is None
        assert again.arguments == network.arguments
        assert torch.equal(again(images), network(images))
        assert network(images).std(dim=0).min() > 1e-4
        recipe = read_model(tmp_path / "model").recipe
        assert recipe["size"] == 3
        json.dumps(recipe)

    def test_what_is_left_open_is_decided_by_the_data(self, kind: type[ImageClassifier]) -> None:
        network = kind(3)
        assert network.image_shape == (1, 28, 28)
        before = copy.deepcopy(network.state_dict())
        network.read_images_of((1, 28, 28))
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
        network.read_images_of((3, 10, 10))
        assert network(torch.randn(2, 3, 10, 10)).shape == (2, 3)
        assert (network.channels, network.image_size) == (3, 10)
        partly = kind(3, channels=3)
        partly.read_images_of((3, 9, 9))
        assert partly.image_shape == (3, 9, 9)

    def test_images_of_another_shape_are_refused_with_both(self, kind: type[ImageClassifier]) -> None:
        message = (
            f"data must have images of 1 channel of 8 x 8, which the {kind.__name__} was made for, but has images of 3 "
            f"channels of 32 x 30; set data.channels to 1 and data.image_size to 8"
        )
        for refusing in (lambda n: n.read_images_of((3, 32, 30)), lambda n: n(torch.zeros(2, 3, 32, 30))):
            with pytest.raises(ValueError, match=exactly(message)):
                refusing(kind(3, 1, 8))

    def test_convolutions_are_kept_with_channels_last(self, kind: type[ImageClassifier]) -> None:
        network = kind(3, 3, 12)
        network.read_images_of((3, 12, 12))
        for name, weight in network.named_parameters():
            assert weight.is_contiguous(memory_format=torch.channels_last) or weight.ndim != 4, name

    def test_its_layers_are_blocks_and_its_head_is_above_them(self, kind: type[ImageClassifier]) -> None:
        network = kind(3)
        assert sum(isinstance(module, Block) for module in network.modules()) == BLOCKS[kind]
        found, top = depths(network)
        *_, weight, bias = network.parameters()
        assert {p for p, depth in found.items() if depth == top} == {weight, bias}
        assert top == BLOCKS[kind] + 1
        assert set(found.values()) == set(range(1, top + 1))

    @pytest.mark.parametrize("training", [False, True])
    def test_features_and_head_are_the_whole(self, kind: type[ImageClassifier], training: bool) -> None:
        network, images = stirred(kind(3)).train(training), torch.randn(4, 1, 28, 28)
        torch.manual_seed(1)
        whole = network(images)
        torch.manual_seed(1)
        assert torch.equal(network.classify(network.features(images)), whole)


def seeds_own(state: dict[str, torch.Tensor]) -> nn.Module:
    """The network of PyTorch's MNIST example, word by word."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 32, 3, 1)
            self.conv2 = nn.Conv2d(32, 64, 3, 1)
            self.dropout1 = nn.Dropout2d(0.25)
            self.dropout2 = nn.Dropout2d(0.5)
            self.fc1 = nn.Linear(9216, 128)
            self.fc2 = nn.Linear(128, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.relu(self.conv1(x))
            x = nn.functional.relu(self.conv2(x))
            x = nn.functional.max_pool2d(x, 2)
            x = self.dropout1(x)
            x = torch.flatten(x, 1)
            x = nn.functional.relu(self.fc1(x))
            x = self.dropout2(x)
            return nn.functional.log_softmax(self.fc2(x), dim=1)

    model = Model()
    model.load_state_dict(state)
    return model


@pytest.mark.filterwarnings("ignore:dropout2d")
def test_the_cnn_is_the_seeds_own_but_for_the_log_softmax() -> None:
    network, images, labels = CNN(10), torch.randn(8, 1, 28, 28), torch.randint(10, (8,))
    reference = seeds_own(network.state_dict())
    torch.testing.assert_close(network.eval()(images).log_softmax(-1), reference.eval()(images))
    losses = []
    for model in (network, reference):
        torch.manual_seed(0)
        losses.append(nn.functional.cross_entropy(model.train()(images), labels))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(("kind", "smallest"), [(CNN, 6), (LeNet, 7)])
def test_every_size_from_the_smallest_on_is_read(kind: type[ImageClassifier], smallest: int) -> None:
    for size in range(smallest, smallest + 12):
        assert kind(2, 1, [size, size + 3])(torch.randn(2, 1, size, size + 3)).shape == (2, 2)
    with pytest.raises(ValueError, match=exactly(f"image_size must be at least {smallest}, but is {smallest - 1}")):
        kind(2, 1, smallest - 1)


def test_a_perceptron_without_layers_is_logistic_regression() -> None:
    network = MLP(3, num_layers=0)
    assert [name for name, _ in network.named_parameters()] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNN(0), "num_classes must be at least 1, but is 0"),
        (lambda: CNN(2, 0), "channels must be at least 1, but is 0"),
        (lambda: MLP(2, 1, [4, 0]), "image_size must be at least 1, but is 0"),
        (lambda: CNN(2, dropout=1.0), "dropout must be in [0, 1), but is 1.0"),
        (lambda: CNN(2, channel_dropout=-0.1), "channel_dropout must be in [0, 1), but is -0.1"),
        (lambda: MLP(2, d_hidden=0), "d_hidden must be at least 1, but is 0"),
        (lambda: MLP(2, num_layers=-1), "num_layers must be at least 0, but is -1"),
        (lambda: LeNet(2, width=0), "width must be at least 1, but is 0"),
        (lambda: LeNet(2, num_layers=0), "num_layers must be at least 1, but is 0"),
        (lambda: LeNet(2, class_names=["a"]), "class_names must be 2 names, as the head is wide, but are 1"),
    ],
)
def test_a_value_out_of_range_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        make()
