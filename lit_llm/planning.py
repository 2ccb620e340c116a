"""Predicts a training's memory, time, energy and cost from a step measured on one device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lit_llm.dry_run import Step

OPTIMAL_TOKENS_PER_PARAMETER = 20.0
"""Hoffmann et al., 2022, "Training Compute-Optimal Large Language Models", arXiv:2203.15556, table 3: 20.0 to 22.9."""

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "tensor_parallel", "fsdp_tensor_parallel")
"""`zero3` is left out, since it shards the same as `fsdp`."""

PAIR = 2
"""Tensor-parallel size of `fsdp_tensor_parallel`, as in its config overlay."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device under a strategy; `peak` is the maximum at any time, the others are its components.

    `weights` includes a moving average of the weights, if one is kept.
    """

    weights: int | float
    gradients: int | float
    optimizer: int | float
    activations: int | float
    peak: int | float


def memory(step: Step, strategy: str, devices: int) -> Memory:
    """Predicts the memory on each device under a strategy, for the measured batch.

    `ddp` holds everything, and a second copy of the gradients in its communication buckets. `zero1` shards the
    optimiser state, `zero2` also the gradients, `fsdp` (ZeRO stage 3) also the weights: two blocks are gathered at a
    time, and cast; parameters outside blocks, and their gradients, stay gathered. `tensor_parallel` divides each matrix
    and, with sequence parallelism, the activations between them, among devices that work on the same batch. This is a
    lower bound, since in `strategies.Sharded` each device stores gathered inputs, embeddings and head in full.
    `fsdp_tensor_parallel` does so in pairs of devices, and the pairs read different batches and shard as `fsdp`. A
    moving average of the weights is sharded as the weights are.

    Args:
        step: The step as measured on one device.
        strategy: One of `STRATEGIES`.
        devices: Number of devices.

    Raises:
        ValueError: When there is no such strategy.

    Source:
        Rajbhandari et al., 2020, "ZeRO", arXiv:1910.02054, section 5; Korthikanti et al., 2022, arXiv:2205.05198,
        section 4.2, for sequence parallelism.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, but is {strategy}")
    w, g, o, a = step.weights + step.average, step.gradients, step.optimizer, step.activations + step.casts
    passes, stepping = step.passes, step.stepping
    rest = stepping - g  # temporaries of the optimiser's step
    if devices == 1:
        return Memory(w, g, o, a, step.peak)
    n = devices
    if strategy == "ddp":
        return Memory(w, 2 * g, o, a, w + o + g + max(passes, stepping))
    if strategy == "zero1":
        return Memory(w, g, o / n, a, w + o / n + max(passes, g + rest / n))
    if strategy == "zero2":
        passes = min(passes, step.passes_without_gradients + g / n)
        return Memory(w, g / n, o / n, a, w + o / n + max(passes, stepping / n))
    if strategy in ("fsdp", "fsdp_tensor_parallel"):
        sharing = PAIR if strategy == "fsdp_tensor_parallel" else 1
        gathered = 2 * step.block / sharing + 2 * step.outside
        passes = min(passes / sharing, step.passes_without_weights / sharing + g / n) + gathered
        a = step.activations / sharing + gathered
        return Memory(w / n, g / n, o / n, a, (w + o) / n + max(passes, stepping / n))
    return Memory(w / n, g / n, o / n, a / n, step.peak / n)


@dataclass(frozen=True)
class Machine:
    """The devices that a run is planned for.

    Attributes:
        memory: Memory of one device in bytes.
        peak_flops: Peak floating-point operations per second of one device's matrix products.
        mfu: Model FLOPs utilisation: the fraction of `peak_flops` that training reaches, in (0, 1].
        watts: Power of one device under load.
        bandwidth: Bytes per second that one device exchanges with the others.
        price: Price of one device per hour; `None` if it is not known.
    """

    memory: int | float
    peak_flops: int | float
    mfu: int | float
    watts: int | float
    bandwidth: int | float
    price: int | float | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("memory", "peak_flops", "watts", "bandwidth"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be finite and above 0, but is {getattr(self, name):g}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu must be in (0, 1], but is {self.mfu:g}")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"--price must be finite and at least 0, but is {self.price:g}")


@dataclass(frozen=True)
class Bill:
    """Time, energy and cost of a training.

    Attributes:
        seconds: Wall-clock time.
        kilowatt_hours: Energy of the devices alone, at `Machine.watts` throughout.
        cost: Cost in the price's currency; `None` without a price.
        efficiency: Fraction of the time that the devices compute; in the rest they wait for communication.
    """

    seconds: float
    kilowatt_hours: float
    cost: float | None
    efficiency: float


def bill(
    flops_per_token: int | float,
    tokens_per_step: int | float,
    traffic: int | float,
    tokens: int | float,
    machine: Machine,
    devices: int,
) -> Bill:
    """Predicts time, energy and cost of a training.

    Computation and communication overlap, so a step takes as long as the longer of the two. Waiting for data,
    checkpoints and failures are not included.

    Args:
        flops_per_token: Floating-point operations per token, forward and backward.
        tokens_per_step: Tokens per step on one device.
        traffic: Bytes that each device sends per step, as from `traffic`.
        tokens: Tokens of the whole training.
        machine: The devices.
        devices: Number of devices.
    """
    computing = flops_per_token * tokens_per_step / (machine.peak_flops * machine.mfu)
    step = max(computing, traffic / machine.bandwidth)
    seconds = step * tokens / (tokens_per_step * devices)
    hours = seconds / 3600 * devices
    cost = None if machine.price is None else hours * machine.price
    return Bill(seconds, hours * machine.watts / 1000, cost, computing / step)


def traffic(step: Step, strategy: str, devices: int) -> int | float:
    """Bytes that each device sends per step.

    A ring all-reduce sends the gradients about twice, and so do `zero1` and `zero2` in two halves. `fsdp` all-gathers
    the weights for both passes and reduce-scatters the gradients once, for each batch of the step.

    Source:
        Rajbhandari et al., 2020, arXiv:1910.02054, section 7.
    """
    share = (devices - 1) / devices
    if strategy == "fsdp":
        return (2 * step.weights + step.gradients) * share * step.parts
    return 2 * step.gradients * share
