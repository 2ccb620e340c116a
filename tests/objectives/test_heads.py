"""Reordering the classes of heads."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from lit_llm.checkpoints import read_model, save_model
from lit_llm.models.cnn import CNN
from lit_llm.models.lenet import LeNet
from lit_llm.models.mlp import MLP
from lit_llm.models.pretrained_pooling import MeanClassifier
from lit_llm.objectives.heads import head_of, order_of, put_in_order
from tests.examples import BERT, example


@pytest.mark.parametrize("kind", [CNN, LeNet, MLP, functools.partial(MeanClassifier, config=BERT)])
def test_a_head_in_another_order_says_the_same_of_each_class(kind, tmp_path: Path) -> None:
    network = kind(3)
    network.class_names = ["a", "b", "c"]
    save_model(tmp_path / "model", network)
    source = read_model(tmp_path / "model")
    if hasattr(network, "image_shape"):
        batch = {"pixel_values": torch.rand(2, *network.image_shape)}
    else:
        batch = {name: tensor for name, tensor in example(0, 3).items() if name not in ("labels", "rows")}
    with torch.no_grad():
        before = source.network(**batch)
        put_in_order(source, order_of(["c", "a"], source.network.class_names), str(tmp_path))
        after = source.network(**batch)
    assert source.network.class_names == ["c", "a", "b"]
    assert torch.allclose(after, before[:, [2, 0, 1]])
    assert len(head_of(source, str(tmp_path))) == 2


def test_classes_are_found_by_their_letters_before_their_case_is_passed_over() -> None:
    assert order_of(["b", "B"], ["B", "b"]) == [1, 0]
    assert order_of(["b", "B"], ["b", "a"]) is None
    assert order_of(["2", "3"], ["1", "2", "3"]) == [1, 2, 0]
    assert order_of(["1", "2"], ["no", "yes"]) == [0, 1]
