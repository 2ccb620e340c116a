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
    before = make(), make()  # a peak of its own, as high as what comes later
    del before
    held, rise = make(), MemoryRise()
    trainer, module = Trainer(accelerator="cpu", logger=False), LightningModule()
    rise.setup(trainer, module, "fit")
    new = make()
    del new
    rise.on_train_batch_end(trainer, module, None, None, 0)
    assert 120 * MIB < rise.bytes < 140 * MIB
    mapped = torch.from_file(str(file), shared=True, size=64 * MIB, dtype=torch.uint8)
    new = make()
    assert mapped.max() == 0
    rise.setup(trainer, module, "test")  # which does not begin anew
    rise.on_train_batch_end(trainer, module, None, None, 1)
    assert 120 * MIB < rise.bytes < 140 * MIB
    assert held.min() == new.min() == 1


def test_where_nothing_tells_of_files_the_peak_is_that_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr("lit_llm.callbacks.memory_rise.STATUS", tmp_path / "nowhere")
    assert peak_and_files()[0] > peak_and_files()[1] == 0
