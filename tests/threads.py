"""Simulates devices by threads of one process, with working communication: faster than processes for small tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg


def each(count: int, work: Callable[[], Any]) -> list[Any]:
    """Runs `work` on `count` devices, which form the default process group; returns the result of each."""
    found, store = [None] * count, dist.HashStore()

    def run(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=count, store=store)
        try:
            found[rank] = work()
        except BaseException as error:
            found[rank] = error
            raise
        finally:
            dist.destroy_process_group()

    _install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return found
