"""What a training will take, worked out from what a step takes on one device: memory, time, energy, cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lit_llm.dry_run import Step

OPTIMAL_TOKENS_PER_PARAMETER = 20.0
"""Hoffmann et al., 2022, "Training Compute-Optimal Large Language Models", arXiv:2203.15556, table 3: 20.0 to 22.9."""

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "tensor_parallel", "fsdp_tensor_parallel")
"""`zero3` shards what `fsdp` does."""

PAIR = 2
"""Devices that share products under `fsdp_tensor_parallel`, as its overlay has it."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device under a strategy; `peak` is the most at once, the others are what it is made of.

    `weights` are those and, where one is kept, their average.
    """

    weights: int | float
    gradients: int | float
    optimizer: int | float
    activations: int | float
    peak: int | float


def memory(step: Step, strategy: str, devices: int) -> Memory:
    """What a strategy leaves on each device, for the same batch on each.

    `ddp` holds everything, and the gradients once more in the buckets that it exchanges. `zero1` shares out the
    optimiser's state, `zero2` the gradients too, `fsdp` (ZeRO's third stage) the weights too, of which two blocks are
    gathered at a time, and cast there; what is in no block is gathered throughout, and so are its gradients.
    `tensor_parallel` divides each matrix, and by sequence parallelism what flows between them, among the devices that
    work on one batch: the least that there can be, as `strategies.Sharded` keeps what it gathers, embeddings and head
    on each. `fsdp_tensor_parallel` does that in pairs, among which the pairs' rows and all weights are shared out as by
    `fsdp`. An average of the weights is shared out as they are.

    Args:
        step: What the step takes on one device.
        strategy: One of `STRATEGIES`.
        devices: Devices that share.

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
    rest = stepping - g  # what the optimiser makes while it steps
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
        memory: Bytes of one.
        peak_flops: Floating-point operations a second that one's matrix products can reach.
        mfu: Part of that which training reaches, in (0, 1].
        watts: Power of one at work.
        bandwidth: Bytes a second that one exchanges with the others.
        price: Of one for an hour; `None` where it is not known.
    """

    memory: int | float
    peak_flops: int | float
    mfu: int | float
    watts: int | float
    bandwidth: int | float
    price: int | float | None = None

    def __post_init__(self) -> None:
        """Checks.

        Raises:
            ValueError: When a value is out of range.
        """
        for name in ("memory", "peak_flops", "watts", "bandwidth"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be finite and above 0, but is {getattr(self, name):g}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu must be in (0, 1], but is {self.mfu:g}")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"--price must be finite and at least 0, but is {self.price:g}")


@dataclass(frozen=True)
class Bill:
    """What a training takes.

    Attributes:
        seconds: Of wall clock.
        kilowatt_hours: Of the devices alone, at their power.
        cost: In the price's currency; `None` where there is no price.
        efficiency: Part of the time that the devices compute; they exchange in the rest of it.
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
    """Time, energy and cost of a training.

    Computing and exchanging overlap, so a step takes as long as the longer of the two. Waiting for data, checkpoints
    and failures are not in it.

    Args:
        flops_per_token: Forward and backward.
        tokens_per_step: Of one device.
        traffic: Bytes that each device sends in a step, as `traffic` says.
        tokens: Of the whole training.
        machine: The devices.
        devices: How many.
    """
    computing = flops_per_token * tokens_per_step / (machine.peak_flops * machine.mfu)
    step = max(computing, traffic / machine.bandwidth)
    seconds = step * tokens / (tokens_per_step * devices)
    hours = seconds / 3600 * devices
    cost = None if machine.price is None else hours * machine.price
    return Bill(seconds, hours * machine.watts / 1000, cost, computing / step)


def traffic(step: Step, strategy: str, devices: int) -> int | float:
    """Bytes that each device sends in a step.

    A ring's all-reduce of the gradients sends them about twice, and so do `zero1` and `zero2` in two halves; `fsdp`
    gathers the weights for both passes and scatters the gradients once, of each batch of the step again.

    Source:
        Rajbhandari et al., 2020, arXiv:1910.02054, section 7.
    """
    share = (devices - 1) / devices
    if strategy == "fsdp":
        return (2 * step.weights + step.gradients) * share * step.parts
    return 2 * step.gradients * share
