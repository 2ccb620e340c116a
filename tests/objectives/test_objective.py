from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from lit_llm.checkpoint_files import AtomicCheckpointIO, read_checkpoint
from lit_llm.checkpoints import load_model
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.exact_steps import Loss
from lit_llm.objectives.objective import Objective
from tests.writing import exactly


class Act(enum.Enum):
    silu = "silu"
    tanh = "tanh"


class Points(LightningDataModule):
    """Points of two classes, in two clouds."""

    num_classes = 2

    def train_dataloader(self) -> DataLoader:
        draw = torch.Generator().manual_seed(0)
        labels = torch.arange(16) % 2
        x = torch.randn(16, 4, generator=draw) + 2 * labels[:, None]
        return DataLoader([{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)], batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


class Net(nn.Module):
    def __init__(
        self, num_classes: int, act: Act = Act.silu, activation: nn.Module | None = None, function: Any = None
    ) -> None:
        super().__init__()
        self.act = activation or {Act.silu: F.silu, Act.tanh: torch.tanh}[act]
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.into(x)))


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False} | quiet | options
    return Trainer(default_root_dir=folder, plugins=[AtomicCheckpointIO()], **options)


def fitted(folder: Path, made: Objective, data: LightningDataModule | None = None, **options: Any) -> Trainer:
    found = trainer(folder, **options)
    found.fit(made, datamodule=data or Points())
    return found


def test_a_network_with_an_enum_says_the_same_when_it_is_loaded_again(tmp_path: Path) -> None:
    made = Classification(network=functools.partial(Net, act=Act.tanh))
    fitted(tmp_path, made).save_checkpoint(tmp_path / "x.ckpt")
    x = torch.randn(3, 4)
    torch.testing.assert_close(load_model(tmp_path / "x.ckpt")[0](x), made.network(x))


def test_a_network_that_a_checkpoint_could_not_make_again_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    made = Classification(network=functools.partial(Net, function=Act.tanh))
    message = (
        "model.network.function must be what a checkpoint can make again by its annotation, none, but is "
        "<Act.tanh: 'tanh'>; let it be a plain type, an enum, a dataclass or a torch module, and be annotated so"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        fitted(tmp_path, made)


class Warm(Classification):
    """An objective with a trainable temperature."""

    def __init__(self, network: Callable[..., nn.Module] | None = None, in_beside: bool = False) -> None:
        super().__init__(network, functools.partial(torch.optim.SGD, lr=0.5))
        self.save_arguments()
        self.in_beside, self.warmth = in_beside, nn.ParameterDict({"temperature": torch.ones(())})

    @property
    def beside(self) -> nn.Module:
        return self.warmth if self.in_beside else super().beside

    def logits(self, batch: Any) -> Tensor:
        return super().logits(batch) * self.warmth["temperature"]


def test_a_parameter_beside_the_network_learns(tmp_path: Path) -> None:
    made = Warm(Net, in_beside=True)
    fitted(tmp_path, made)
    assert made.warmth["temperature"] != 1.0


def test_a_parameter_that_nothing_optimises_is_refused_before_training(tmp_path: Path) -> None:
    message = (
        "model.warmth.temperature must be in the network or in the objective's beside, to be optimised, but is in "
        "neither; return its module from the property beside, or set its requires_grad to false"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        fitted(tmp_path, Warm(Net))


class Wide(Net):
    """A network whose number of classes is not the first argument."""

    def __init__(self, d_hidden: int = 8, num_classes: int = 3) -> None:
        super().__init__(num_classes)


def test_a_network_that_is_not_sized_by_its_first_argument_is_refused(tmp_path: Path) -> None:
    message = "model.network must take num_classes as its first argument, but is Wide, whose first is d_hidden"
    with pytest.raises(ValueError, match=exactly(message)):
        fitted(tmp_path, Least(Wide))
    fitted(tmp_path, Least(functools.partial(Wide, 16)))


class Least(Objective):
    """The smallest possible objective."""

    size_name: ClassVar[str] = "num_classes"

    def loss(self, batch: Any) -> Loss:
        total = F.cross_entropy(self.reading(batch["x"]), batch["labels"], reduction="sum")
        return total, total.new_tensor(len(batch["labels"]))


def test_the_network_of_an_objective_of_no_more_than_a_loss_is_read_again(tmp_path: Path) -> None:
    made = Least(functools.partial(Net, act=Act.tanh), decay_embeddings=True)
    fitted(tmp_path, made).save_checkpoint(tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt")["hyper_parameters"]["decay_embeddings"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(load_model(tmp_path / "x.ckpt")[0](x), made.network(x))


class Squared(Least):
    """Uses a single torchmetrics metric."""

    def build(self) -> None:
        super().build()
        self.val_metric, self.test_metric = MeanSquaredError(), MeanSquaredError()

    def measure(self, metric: MeanSquaredError, batch: Any) -> None:
        metric.update(self.reading(batch["x"])[:, 1], batch["labels"].float())


def test_a_single_metric_is_called_by_its_class(tmp_path: Path) -> None:
    assert set(fitted(tmp_path, Squared(Net)).callback_metrics) == {"val/mean_squared_error"}


@pytest.mark.parametrize("kind", [Least, Squared])
def test_many_batches_are_measured_in_16_bits_as_in_32(kind: type, tmp_path: Path) -> None:
    data, checkpoint = Points(), tmp_path / "x.ckpt"
    data.val_dataloader = lambda: DataLoader([*data.train_dataloader()] * 100, batch_size=None)
    low, full = fitted(tmp_path, kind(Net), data, precision="bf16-true"), trainer(tmp_path)
    low.save_checkpoint(checkpoint)
    full.validate(kind(Net), datamodule=data, ckpt_path=checkpoint, verbose=False)
    found, wanted = ({n: v.item() for n, v in run.callback_metrics.items()} for run in (low, full))
    assert found.keys() & {"val/loss", "val/mean_squared_error"}
    assert found == pytest.approx(wanted, rel=0.01)


def test_what_no_network_reads_keeps_its_digits_where_the_network_is_in_16_bits(tmp_path: Path) -> None:
    made, data, read = Classification(Net), Points(), []
    loss = made.loss
    made.logits = lambda batch: made.network(batch["x"])
    made.loss = lambda batch: read.append(batch) or loss(batch)
    batches = [batch | {"num_bytes": torch.full((4,), 1001.0)} for batch in data.train_dataloader()]
    data.train_dataloader = lambda: DataLoader(batches, batch_size=None)
    trainer(tmp_path, max_steps=1, precision="bf16-true", limit_val_batches=0).fit(made, datamodule=data)
    assert read[0]["x"].dtype == torch.bfloat16
    assert read[0]["num_bytes"].tolist() == [1001.0] * 4
