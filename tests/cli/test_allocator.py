"""The C library is told to keep freed memory, unless the user has configured it otherwise."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from lit_llm.cli.allocator import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(
    ("name", "value", "calls"),
    [
        ("OMP_NUM_THREADS", "1", 3),
        ("MALLOC_ARENA_MAX", "2", 3),
        ("MALLOC_MMAP_THRESHOLD_", "65536", 0),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536", 0),
        ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.cpu.hwcaps=x", 3),
    ],
)
def test_freed_memory_is_kept_unless_the_environment_says_how(monkeypatch, name, value, calls):
    for other in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    told = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *words: told.append(words)))
    keep_freed_memory()
    assert len(told) == calls
