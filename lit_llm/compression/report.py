"""Cost of a network, counted or measured: parameters, memory, latency."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llm.compression.calibration import answer
from lit_llm.compression.compression import Batch
from lit_llm.compression.integers import Quantized
from lit_llm.modes import evaluating

BATCH_SIZES = (1, 32)


def count_parameters(network: nn.Module) -> int:
    """Number of weights of a network, quantised ones included; tied weights count once.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    whole = sum(m.qdata.numel() for m in network.modules() if isinstance(m, Quantized))
    return whole + sum(p.numel() for p in network.parameters())


def count_nonzero(network: nn.Module) -> int:
    """Number of weights that are not zero.

    Example:
        >>> layer = nn.Linear(3, 2, bias=False)
        >>> _ = layer.weight.data.fill_(1.0)[0].zero_()
        >>> count_nonzero(layer)
        3
    """
    whole = sum(int(m.qdata.count_nonzero()) for m in network.modules() if isinstance(m, Quantized))
    return whole + sum(int(p.detach().count_nonzero()) for p in network.parameters())


class _Live(TorchDispatchMode):
    """Tracks the bytes of live tensors and their peak, without those of the given tensors."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders = Counter(tensor.untyped_storage().data_ptr() for tensor in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in given if isinstance(given, list | tuple) else [given]:
            if type(tensor) is Tensor:
                self._see(tensor)
        return given

    def _see(self, tensor: Tensor) -> None:
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        self._holders[place] += 1
        if self._holders[place] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            self.now -= size


@torch.no_grad()
def peak_memory(network: nn.Module, batch: Batch) -> int:
    """Peak bytes of live tensors in a forward pass: parameters, buffers and activations.

    On CUDA, the peak of the allocator. Elsewhere, the outputs of operations without their scratch space, which makes
    the number independent of the machine.
    """
    state = [*network.parameters(), *network.buffers()]
    device = next(iter(network.state_dict().values())).device
    with evaluating(network):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            answer(network, batch)
            return torch.cuda.max_memory_allocated(device)
        with _Live(state) as live:
            answer(network, batch)
    return sum(tensor.nbytes for tensor in state) + live.peak


def rows_of(batch: Batch, num_rows: int) -> dict[str, Any]:
    """A batch of `num_rows` rows; rows are repeated if there are too few."""
    size = len(next(value for value in batch.values() if isinstance(value, Tensor)))
    rows = torch.arange(num_rows) % size
    return {
        name: value[rows.to(value.device)]
        for name, value in batch.items()
        if isinstance(value, Tensor) and len(value) == size
    }


@torch.no_grad()
def latencies(
    networks: Mapping[str, nn.Module], batch: Batch, repeats: int = 30, compiled: bool = False
) -> dict[str, np.ndarray]:
    """Milliseconds of each forward pass of each network, measured in turns so that all see the same machine load.

    Args:
        networks: Networks by name; each gets three warm-up passes.
        batch: Their input.
        repeats: Number of timed passes per network.
        compiled: Compile each with torch.compile first.
    """
    device = next(iter(next(iter(networks.values())).state_dict().values())).device
    asked: dict[str, Callable[[], Any]] = {}
    for name, network in networks.items():
        network.eval()
        answer(network, batch)  # builds torchao's weights, which torch.compile cannot trace
        if compiled:
            network.compile()
        asked[name] = lambda network=network: answer(network, batch)
        for _ in range(3):
            asked[name]()
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(repeats):
        for name, ask in asked.items():
            _wait(device)
            started = time.perf_counter()
            ask()
            _wait(device)
            taken[name].append(1000 * (time.perf_counter() - started))
    return {name: np.array(values) for name, values in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def speeds(
    networks: Mapping[str, nn.Module], batch: Batch, repeats: int = 30, compiled: bool = False
) -> dict[str, dict[str, float]]:
    """Latency of networks in milliseconds, for one row and for 32 (`_b32`), and throughput in rows per second."""
    found: dict[str, dict[str, float]] = {name: {} for name in networks}
    for size in BATCH_SIZES:
        end = "" if size == 1 else f"_b{size}"
        for name, taken in latencies(networks, rows_of(batch, size), repeats, compiled).items():
            p50, p95 = (float(value) for value in np.percentile(taken, [50, 95]))
            found[name] |= {f"latency_ms_p50{end}": p50, f"latency_ms_p95{end}": p95}
            found[name]["throughput_b1" if size == 1 else "throughput"] = 1000 * size / p50
    return found
