"""Settings of matmuls: their dtype, their library on a CPU, and when they are faster than a flash kernel."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}
"""Types by the first part of a precision's name."""

CPU_INFO = Path("/proc/cpuinfo")

MAX_QUERIES = {torch.bfloat16: (4096, 4096), torch.float32: (0, 0)}
"""Largest number of queries for which two matmuls are faster than the CPU's flash kernel.

The pair is (in general, causal without an explicit mask). In float32 they are faster only with oneDNN
(`multiply_by_onednn`)."""


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matmuls of `x` are computed: autocast's if it is enabled."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


@functools.cache
def multiplies_bfloat16(kind: str) -> bool:
    """Whether a kind of device is known to have instructions for bfloat16; a CPU without them is many times slower.

    False for devices other than CPUs and CUDA's, and for CPUs on systems without `/proc/cpuinfo`.
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and torch.backends.mkldnn.is_available() and bool(re.search(r"bf16\b", _cpu_info()))


def _cpu_info() -> str:
    return CPU_INFO.read_text() if CPU_INFO.exists() else ""


@contextmanager
def fused_attention() -> Iterator[None]:
    """Makes torch's own attention compute all attention, however few the queries."""
    before = dict(MAX_QUERIES)
    MAX_QUERIES.clear()
    try:
        yield
    finally:
        MAX_QUERIES.update(before)


def multiply_by_onednn() -> None:
    """Makes torch compute float32 matmuls with oneDNN on AMD CPUs, on which MKL, its default, does not use AVX-512.

    Torch uses oneDNN if it may round the factors to bfloat16. OneDNN does so only with Intel's AMX, so on these CPUs
    matmuls stay in float32. The flash kernel's small matmuls become slower, so attention over short sequences no longer
    uses it (`MAX_QUERIES`). Does nothing if there is an accelerator, whose matmuls would be rounded, or if a precision
    has been chosen already.
    """
    if torch.accelerator.is_available() or torch.backends.mkldnn.matmul.fp32_precision != "none":
        return
    cpu = _cpu_info()
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if has_avx512 and "AuthenticAMD" in cpu and "amx" not in cpu and torch.backends.mkldnn.is_available():
        torch.set_float32_matmul_precision("medium")
        MAX_QUERIES[torch.float32] = (224, 512)
