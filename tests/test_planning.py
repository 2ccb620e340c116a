"""Memory per device by strategy, cost of training, and published figures for large networks."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest
import torch
import yaml

from lit_llm.dry_run import Step
from lit_llm.models.llama import Llama
from lit_llm.planning import STRATEGIES, Machine, bill, memory, traffic
from tests.writing import REPOSITORY


@pytest.fixture
def plain():
    """A training step in round numbers."""
    return Step(
        parameters=250_000,
        embeddings=20_000,
        trained=250_000,
        weights=1_000_000,
        gradients=1_000_000,
        optimizer=2_000_000,
        activations=3_000_000,
        casts=0,
        passes=3_500_000,
        passes_without_gradients=3_200_000,
        passes_without_weights=3_200_000,
        stepping=1_100_000,
        block=200_000,
        outside=100_000,
        moved=20_000_000,
        operations=1000,
        flops=400_000_000,
        tokens=256,
    )


def test_each_strategy_holds_no_more_than_the_one_before_and_one_device_holds_everything(plain):
    peaks = [memory(plain, strategy, 8).peak for strategy in ("ddp", "zero1", "zero2", "fsdp")]
    assert peaks == sorted(peaks, reverse=True)
    assert {memory(plain, strategy, 1).peak for strategy in STRATEGIES} == {plain.peak}
    sharded = memory(plain, "fsdp", 8)
    assert (8 * sharded.weights, 8 * sharded.optimizer) == (plain.weights, plain.optimizer)
    assert memory(plain, "zero1", 8).weights == plain.weights
    pairs = memory(plain, "fsdp_tensor_parallel", 8)
    assert (pairs.weights, pairs.optimizer) == (sharded.weights, sharded.optimizer)
    assert sharded.activations == 3_000_000 + 2 * 200_000 + 2 * 100_000
    assert pairs.activations == 1_500_000 + 200_000 + 2 * 100_000
    assert memory(plain, "tensor_parallel", 8).peak < pairs.peak < sharded.peak
    named = ", ".join(STRATEGIES)
    with pytest.raises(ValueError, match=f"strategy must be one of {named}, but is x"):
        memory(plain, "x", 8)


def test_an_average_of_the_weights_is_held_as_they_are_and_is_not_exchanged(plain):
    averaged = replace(plain, average=plain.weights)
    assert averaged.peak - plain.peak == plain.weights
    for strategy in STRATEGIES:
        alone, both = (memory(step, strategy, 8) for step in (plain, averaged))
        assert both.weights == 2 * alone.weights
        assert both.peak - alone.peak == pytest.approx(alone.weights)
        assert traffic(averaged, strategy, 8) == traffic(plain, strategy, 8)


def test_time_energy_and_cost_follow_from_operations(plain):
    machine = Machine(memory=80e9, peak_flops=1e15, mfu=0.5, watts=500, bandwidth=1e15, price=2.0)
    found = bill(1e9, 1000, 0.0, 3.6e12, machine, 2)
    assert found.seconds == pytest.approx(3.6e12 * 1e9 / 1e15)
    assert found.kilowatt_hours == pytest.approx(1000 * 2 * 0.5)
    assert found.cost == pytest.approx(1000 * 2 * 2.0)
    assert found.efficiency == 1.0
    slow = bill(1e9, 1000, 4e-3 * 1e15, 3.6e12, machine, 2)  # 2 ms of computation, 4 ms of communication
    assert slow.efficiency == pytest.approx(0.5)
    assert slow.seconds == pytest.approx(2 * found.seconds)
    assert traffic(plain, "fsdp", 2) == 1.5 * traffic(plain, "ddp", 2) == 1.5 * plain.gradients
    assert traffic(plain, "ddp", 1) == 0
    several = replace(plain, parts=4)
    assert traffic(several, "fsdp", 2) == 4 * traffic(plain, "fsdp", 2)
    assert traffic(several, "ddp", 2) == traffic(plain, "ddp", 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mfu", 1.5),
        ("mfu", nan),
        ("memory", 0.0),
        ("bandwidth", inf),
        ("watts", nan),
        ("price", -1.0),
        ("price", nan),
    ],
)
def test_a_machine_that_cannot_be_is_refused(field, value):
    good = {"memory": 1.0, "peak_flops": 1.0, "mfu": 0.5, "watts": 1.0, "bandwidth": 1.0}
    with pytest.raises(ValueError, match=f"--{field} must be"):
        Machine(**(good | {field: value}))


@pytest.mark.parametrize(("name", "published"), [("8b", 8_030_261_248), ("70b", 70_553_706_496)])
def test_llama_3_has_the_parameters_that_were_published(name, published):
    config = yaml.safe_load((REPOSITORY / f"configs/models/llama3_{name}.yaml").read_text())
    with torch.device("meta"):
        network = Llama(128_256, **config["init_args"])
    assert sum(p.numel() for p in network.parameters()) == published
