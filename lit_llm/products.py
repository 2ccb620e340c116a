"""How matrices are multiplied: in which dtype, on a CPU by which library, and what that makes of attention."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

CPU_INFO = Path("/proc/cpuinfo")

MAX_QUERIES = {torch.bfloat16: (4096, 4096), torch.float32: (0, 0)}
"""Of how many queries attention by matrix products beats the CPU's flash kernel.

The first number is in general, the second where all look back, and no mask is needed for that.

With 32 bits only where oneDNN multiplies those (`multiply_by_onednn`)."""


def product_dtype(x: Tensor) -> torch.dtype:
    """In which dtype products of it are taken: autocast's, where that is on."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def multiply_by_onednn() -> None:
    """Has torch multiply matrices of 32-bit numbers by oneDNN where MKL, its own choice, leaves AVX-512 unused: on AMD.

    Torch goes there when told that products may be rounded to bfloat16, which oneDNN does with Intel's AMX alone: on
    these CPUs all products keep 32 bits. The flash kernel's small products are slower then, so short sequences are
    attended to without it. Does nothing beside a GPU, which would take that as leave to round its own, nor where
    somebody has chosen a precision.
    """
    if torch.accelerator.is_available() or torch.backends.mkldnn.matmul.fp32_precision != "none":
        return
    cpu = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if has_avx512 and "AuthenticAMD" in cpu and "amx" not in cpu and torch.backends.mkldnn.is_available():
        torch.set_float32_matmul_precision("medium")
        MAX_QUERIES[torch.float32] = (224, 512)
