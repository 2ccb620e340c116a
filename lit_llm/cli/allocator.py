"""Keeps freed memory in the process instead of returning it to the kernel (glibc only)."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
DECISIVE = ("trim_threshold", "top_pad", "mmap_max", "mmap_threshold")
"""Settings of the environment that decide about freed memory: variables `MALLOC_…_` or glibc tunables."""


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed memory instead of handing it back to the kernel.

    By default glibc maps each tensor of more than a few megabytes anew at every step, and its pages are faulted in one
    by one: on a CPU that costs more than many of the operations on it. The kept memory is fragmented: its holes take
    about a fifth of what tensors take (`experiments/planning`). Call this before the first large allocation. It does
    nothing with another C library, or if the environment sets one of `DECISIVE`: for example,
    `MALLOC_MMAP_THRESHOLD_=65536` returns all large blocks to the kernel.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    decided = any(f"MALLOC_{n.upper()}_" in os.environ or f"glibc.malloc.{n}=" in tunables for n in DECISIVE)
    if decided or not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 << 20)
