"""Which library multiplies matrices on a CPU, and what that makes of attention."""

from __future__ import annotations

from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")

MAX_MATMUL_SEQ = {torch.bfloat16: 512, torch.float32: 0}
"""Up to this length two matrix products beat the CPU's flash kernel; the memory they need grows as seq².

With 32 bits only where oneDNN multiplies those (`multiply_by_onednn`)."""


def longest_by_products(device: torch.device, dtype: torch.dtype) -> int:
    """Up to which length attention is to be two matrix products; 0 for an export, which asks no size."""
    return MAX_MATMUL_SEQ.get(dtype, 0) if device.type == "cpu" and not torch.compiler.is_exporting() else 0


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
        MAX_MATMUL_SEQ[torch.float32] = 224
