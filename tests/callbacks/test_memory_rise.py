"""What training adds to the memory of its process."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_llm.callbacks.memory_rise import MemoryRise, peak_and_files

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot begin anew")
def test_what_was_held_before_does_not_count_and_what_is_freed_meanwhile_does(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(64 * MIB))
    make = functools.partial(torch.ones, 128 * MIB, dtype=torch.uint8)
    before = make()  # a peak of its own, far above what comes later
    del before
    held, rise, trainer = make(), MemoryRise(), Trainer(accelerator="cpu", logger=False)
    rise.setup(trainer, LightningModule(), "fit")
    assert 0 <= rise.bytes < 8 * MIB
    new = make()
    del new
    mapped = torch.from_file(str(file), shared=True, size=64 * MIB, dtype=torch.uint8)
    assert mapped.max() == 0
    assert 120 * MIB < rise.bytes < 140 * MIB
    rise.setup(trainer, LightningModule(), "fit")  # of a test after the fit
    assert rise.bytes > 120 * MIB
    assert held.min() == 1


def test_where_nothing_tells_of_files_the_peak_is_that_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr("lit_llm.callbacks.memory_rise.STATUS", tmp_path / "nowhere")
    assert peak_and_files()[0] > peak_and_files()[1] == 0
