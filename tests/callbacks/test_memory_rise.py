"""The memory that training adds to its process."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_llm.callbacks.memory_rise import MemoryRise, peak_and_files

MIB = 2**20


def taken() -> mmap.mmap:
    """128 MiB of resident pages, independent of what the C library does with freed memory."""
    pages = mmap.mmap(-1, 128 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, 128 * MIB, mmap.PAGESIZE):
        pages[start] = 1
    return pages


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot begin anew")
def test_what_was_held_before_does_not_count_and_what_is_freed_meanwhile_does(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(64 * MIB))
    for pages in (taken(), taken()):  # an earlier peak, as high as the later one
        pages.close()
    held, rise = taken(), MemoryRise()
    trainer, module = Trainer(accelerator="cpu", logger=False), LightningModule()
    rise.setup(trainer, module, "fit")
    new = taken()
    new.close()
    rise.on_train_batch_end(trainer, module, None, None, 0)
    assert 120 * MIB < rise.bytes < 140 * MIB
    mapped = torch.from_file(str(file), shared=True, size=64 * MIB, dtype=torch.uint8)
    new = taken()
    assert mapped.max() == 0
    rise.setup(trainer, module, "test")  # which must not reset the peak
    rise.on_train_batch_end(trainer, module, None, None, 1)
    assert 120 * MIB < rise.bytes < 140 * MIB
    new.close()
    held.close()


def test_where_nothing_tells_of_files_the_peak_is_that_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr("lit_llm.callbacks.memory_rise.STATUS", tmp_path / "nowhere")
    assert peak_and_files()[0] > peak_and_files()[1] == 0
