from types import SimpleNamespace

import torch
from lightning.pytorch import Trainer
from torch import nn

from lit_llm.batch import keep_unread
from lit_llm.callbacks.calibration import calibration_batches
from lit_llm.compression.calibration import input_norms
from lit_llm.models.lenet import LeNet


def test_batches_are_in_the_precision_of_the_run_as_those_that_it_trains_on() -> None:
    images = {"pixel_values": torch.randn(2, 1, 28, 28), "labels": torch.tensor([1906.0, 3.0]), "rows": torch.arange(2)}
    trainer = Trainer(accelerator="cpu", precision="bf16-true", logger=False, enable_checkpointing=False)
    keep_unread(trainer.precision_plugin)
    trainer.datamodule = SimpleNamespace(train_dataloader=lambda: [images] * 3)
    batches = calibration_batches(trainer, 2)
    assert [batch["pixel_values"].dtype for batch in batches] == [torch.bfloat16] * 2
    assert torch.equal(batches[0]["labels"], images["labels"])
    network = LeNet(10).bfloat16()
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert input_norms(network, layers, batches).keys() == layers.keys()
