import pytest
import torch
from torch import nn

from lit_llm.modes import evaluating


def test_all_are_evaluated_and_each_has_its_own_mode_again() -> None:
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    network[1][0].eval()
    modes = [module.training for module in network.modules()]
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == modes
    assert set(modes) == {True, False}


def test_an_error_leaves_the_modes_as_they_were() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), evaluating(network):
        network(torch.zeros(3))
    assert network.training
    assert network[0].training
