"""Keeps freed memory in the process, where the C library lets us ask for that."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
DECISIVE = ("trim_threshold", "top_pad", "mmap_max", "mmap_threshold")
"""What the environment may say of freed memory: as `MALLOC_…_`, or among glibc's tunables."""


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed memory instead of handing it back to the kernel.

    By default each tensor of more than a few megabytes is mapped anew and its pages faulted in one by one, at every
    step: on a CPU that costs more than many of the operations on it. What is kept has holes, of about a fifth of what
    tensors take (`experiments/planning`). To be called before the first large allocation. Does nothing where the C
    library is another one, or the environment says how it shall be: `MALLOC_MMAP_THRESHOLD_=65536` hands all back.
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
