"""Has 32-bit numbers multiplied by the library that is fastest on this CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_llm.models.attention import MAX_MATMUL_SEQ

CPU_INFO = Path("/proc/cpuinfo")


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
