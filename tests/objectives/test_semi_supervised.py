from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_llm.adaptation import FrozenLayers, LoRA
from lit_llm.callbacks.metrics_csv import read_metrics
from lit_llm.checkpoints import load_model, read_model
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.semi_supervised import FixMatch, MeanTeacher, SemiSupervised
from tests.examples import BERT, Examples, partly_labelled, together
from tests.writing import REPOSITORY, exactly

KINDS = [FixMatch, MeanTeacher]
NETWORK = functools.partial(PretrainedClassifier, config=BERT)


class Few(Examples):
    """24 labelled examples, each with six unlabelled ones."""

    def train_dataloader(self) -> DataLoader:
        batches = [partly_labelled(row, self.num_classes, 6) for row in range(24)]
        return DataLoader([together(batches[i : i + 8]) for i in range(0, 24, 8)], batch_size=None)


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    shown = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(
        accelerator="cpu", default_root_dir=tmp_path, num_sanity_val_steps=0, max_epochs=-1, **(shown | options)
    )


def built(kind: type, **options: Any) -> SemiSupervised:
    torch.manual_seed(0)
    made = kind(NETWORK, functools.partial(torch.optim.AdamW, lr=0.01), num_classes=3, **options)
    made.configure_model()
    with torch.no_grad():  # a fresh network predicts nearly the same for all examples
        for mine, average in zip(made.network.parameters(), made.average.parameters()):
            mine += 0.4 * torch.randn_like(mine)
            average.copy_(mine)
    return made


def batch_of(count: int = 4) -> dict[str, Any]:
    return together([partly_labelled(row, 3, 5) for row in range(count)])


def probabilities(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).softmax(-1)


# The losses.


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_fixmatch_is_the_papers_equations(threshold: float) -> None:
    made, batch = built(FixMatch, threshold=threshold, unlabelled_weight=0.7), batch_of()
    weak, strong = (probabilities(made.network, batch[name]) for name in ("unlabelled", "unlabelled_strong"))
    labelled = F.nll_loss(probabilities(made.network, batch).log(), batch["labels"])
    sure, pseudo = weak.max(-1)
    unlabelled = [-math.log(strong[row, pseudo[row]]) for row in range(20) if sure[row] >= threshold]
    assert threshold != 0.6 or 0 < len(unlabelled) < 20
    total, count = made.loss(batch)
    expected = labelled.item() + 0.7 * sum(unlabelled) / 20
    assert (total / count).item() == pytest.approx(expected, rel=1e-5)


def test_mean_teacher_is_the_squared_distance_from_what_the_average_says() -> None:
    made, batch = built(MeanTeacher, unlabelled_weight=3.0, ramp_up_steps=0), batch_of()
    with torch.no_grad():
        for p in made.average.parameters():
            p += 0.3 * torch.randn_like(p)
    taught = probabilities(made.average, batch["unlabelled"])
    said = probabilities(made.network, batch["unlabelled_strong"])
    labelled = F.nll_loss(probabilities(made.network, batch).log(), batch["labels"])
    total, count = made.loss(batch)
    expected = labelled + 3.0 * (taught - said).square().sum(-1).mean()
    torch.testing.assert_close(total / count, expected)
    assert (taught - said).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_distribution_alignment_is_the_papers_with_running_means(kind: type, tmp_path: Path) -> None:
    made, heard = built(kind, distribution_alignment=True, decay=0.8, threshold=0.0), []
    made.disagreement = lambda taught, logits: (heard.append(taught.numpy()), logits.sum(-1) * 0)[1]
    known = said = np.full(3, 1 / 3)
    for count in (1, 4, 2):
        batch = batch_of(count)
        made.loss(batch)
        raw = probabilities(made.network.eval(), batch["unlabelled"]).numpy()
        known = 0.8 * known + 0.2 * np.bincount(batch["labels"], minlength=3) / len(batch["labels"])
        said = 0.8 * said + 0.2 * raw.mean(axis=0)
        expected = raw * known / said
        np.testing.assert_allclose(heard[-1], expected / expected.sum(axis=1, keepdims=True), rtol=1e-5)
        assert abs(heard[-1] - raw).max() > 0.01
    assert len(heard) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_no_label_of_an_unlabelled_example_is_learnt_from(kind: type, tmp_path: Path) -> None:
    weights = []
    for poison in (False, True):
        data = Few()
        batches = list(data.train_dataloader())
        for batch in batches if poison else []:
            batch["unlabelled"]["labels"] = torch.full_like(batch["unlabelled"]["labels"], -7)
            batch["unlabelled_strong"]["labels"] = batch["unlabelled"]["labels"]
        made = built(kind, threshold=0.0, ramp_up_steps=0)
        trainer(tmp_path, max_steps=4).fit(made, DataLoader(batches, batch_size=None))
        weights.append(nn.utils.parameters_to_vector(made.network.parameters()))
    assert torch.equal(*weights)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_answers_without_dropout_and_gets_no_gradient(kind: type) -> None:
    torch.manual_seed(0)
    noisy = functools.partial(PretrainedClassifier, config=BERT | {"hidden_dropout_prob": 0.5})
    made = kind(noisy, num_classes=3, threshold=0.0, ramp_up_steps=0)
    made.configure_model()
    seen = []
    made.disagreement = lambda taught, logits: (seen.append(taught), logits.sum(-1))[1]
    for _ in range(2):
        made.loss(batch_of())[0].backward()
    assert torch.equal(*seen)
    assert not seen[0].requires_grad
    assert made.network.training
    assert all(p.grad is None for p in made.average.parameters())
    assert all(p.grad is not None for p in made.network.parameters())


def test_the_weight_rises_with_the_step() -> None:
    made = built(MeanTeacher, unlabelled_weight=2.0, ramp_up_steps=10)
    found = [made.unlabelled_factor(step) for step in (0, 5, 9, 10, 1000)]
    assert found == pytest.approx([2 * math.exp(-5), 2 * math.exp(-1.25), 2 * math.exp(-0.05), 2.0, 2.0])
    assert built(FixMatch).unlabelled_factor(0) == 1.0


# The average.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_that_of_ten_lines(accumulate: int, tmp_path: Path) -> None:
    made = built(FixMatch, decay=0.7)
    history = [nn.utils.parameters_to_vector(made.network.parameters()).detach().clone()]
    step = made.optimizer_step

    def recorded(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        history.append(nn.utils.parameters_to_vector(made.network.parameters()).detach().clone())

    made.optimizer_step = recorded
    trainer(tmp_path, max_steps=6, accumulate_grad_batches=accumulate).fit(made, datamodule=Few())
    average = history[0]
    for number, weights in enumerate(history[1:], start=1):
        decay = min(0.7, number / (number + 1))
        average = decay * average + (1 - decay) * weights
    assert len(history) == 7
    found = nn.utils.parameters_to_vector(made.average.parameters())
    torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-6)
    assert (found - history[-1]).abs().max() > 1e-3


class Normalized(nn.Sequential):
    """A network for images with batch normalisation."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))
        self(pixel_values=torch.randn(2, 1, 6, 6))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values)


class Images(LightningDataModule):
    """Batches of labelled and unlabelled images; bright ones are of class 1."""

    num_classes = 2
    class_names = ("dark", "bright")

    def train_dataloader(self) -> DataLoader:
        def images(seed: int, count: int) -> dict[str, Tensor]:
            labels = torch.arange(count) % 2
            noise = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
            return {"pixel_values": noise + labels.view(-1, 1, 1, 1), "labels": labels, "rows": torch.arange(count)}

        def batch(seed: int) -> dict[str, Any]:
            weak = images(seed + 50, 12)
            del weak["labels"]
            strong = weak | {"pixel_values": weak["pixel_values"].flip(-1)}
            return images(seed, 4) | {"unlabelled": weak, "unlabelled_strong": strong}

        return DataLoader([batch(seed) for seed in range(5)], batch_size=None)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_served_and_running_statistics_are_those_of_the_network(kind: type, tmp_path: Path) -> None:
    made = kind(Normalized, functools.partial(torch.optim.AdamW, lr=0.01), threshold=0.6)
    trainer(tmp_path, max_steps=5).fit(made, datamodule=Images())
    for name, buffer in made.average.named_buffers():
        assert torch.equal(buffer, made.network.get_buffer(name))
    assert made.network[1].running_mean.abs().max() > 0.01
    found = made.take_train_metrics()
    assert found.keys() == {"train/confident"}  # unlabelled examples have no known labels


def test_what_is_evaluated_predicted_and_exported_is_the_average(tmp_path: Path) -> None:
    made, data = built(FixMatch, decay=0.9), Few()
    run = trainer(tmp_path, max_steps=3)
    run.fit(made, datamodule=data)
    with torch.no_grad():
        for p in made.network.parameters():
            p.normal_()
    outputs = trainer(tmp_path).predict(made, datamodule=data)
    rows = together([{"probabilities": output["probabilities"]} for output in outputs])["probabilities"]
    whole = together(list(data.predict_dataloader()))
    torch.testing.assert_close(rows, probabilities(made.average.eval(), whole))
    run.save_checkpoint(tmp_path / "x.ckpt")
    read = load_model(tmp_path / "x.ckpt")[0]
    for name, tensor in made.average.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
    again = FixMatch.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.hparams["decay"] == again.decay == 0.9
    for name, tensor in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("adaptation", [FrozenLayers(1), LoRA(rank=2)])
def test_ways_to_fine_tune_are_those_of_the_average_too(adaptation: Any, tmp_path: Path) -> None:
    made = built(FixMatch, threshold=0.0, adaptation=adaptation)
    run = trainer(tmp_path, max_steps=3)
    before = copy.deepcopy(made.average.state_dict())
    run.fit(made, datamodule=Few())
    moved = {name for name, tensor in made.average.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, p in made.network.named_parameters() if p.requires_grad}
    run.save_checkpoint(tmp_path / "x.ckpt")
    read, batch = read_model(tmp_path / "x.ckpt").network, batch_of()
    torch.testing.assert_close(probabilities(read, batch), probabilities(made.average.eval(), batch))


# Training metrics of the unlabelled examples.


def test_shares_of_confident_and_of_right_examples_are_those_since_the_last_report(tmp_path: Path) -> None:
    made = built(FixMatch, threshold=0.6)
    made.trainer = trainer(tmp_path)
    counted = [0, 0, 0]
    for count in (4, 2):
        batch = batch_of(count)
        sure, pseudo = probabilities(made.network.eval(), batch["unlabelled"]).max(-1)
        made.loss(batch)
        confident = sure >= 0.6
        counted[0] += len(confident)
        counted[1] += int(confident.sum())
        counted[2] += int((pseudo == batch["unlabelled"]["labels"])[confident].sum())
    assert 0 < counted[1] < counted[0]
    assert 0 < counted[2] < counted[1]
    assert made.take_train_metrics() == pytest.approx(
        {"train/confident": counted[1] / counted[0], "train/pseudo_label_accuracy": counted[2] / counted[1]}
    )
    assert made.take_train_metrics() == {"train/confident": 0.0}


# Whole runs.


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_to_the_same_model(lit_llm, tmp_path: Path) -> None:
    lines = [
        f"{row} {'good' if row % 2 else 'bad'} {'x ' * (row % 7)},{'yes' if row % 2 else 'no'}" for row in range(90)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["text,label", *lines]))
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    network = NETWORK(2, config=BERT | dropout | {"vocab_size": 300, "num_hidden_layers": 3})
    (tmp_path / "config.json").write_text(json.dumps(network.arguments["config"]))
    options = {
        "config": REPOSITORY / "configs/finetuning/encoder_semi_supervised.yaml",
        "model.threshold": 0.5,
        "model.distribution_alignment": "true",
        "model.network.config": tmp_path / "config.json",
        "data.path": tmp_path / "table.csv",
        "data.tokenizer": "bert-bpe-300",
        "data.max_seq_len": 32,
        "data.batch_size": 2,
        "trainer.max_epochs": 3,
        "trainer.max_steps": 14,
        "trainer.log_every_n_steps": 1,
        "checkpoint.every_n_steps": 4,
        "test_after_fit": "false",
    }
    words = ["fit", *(f"--{name}={value}" for name, value in options.items())]
    outcome = lit_llm(*words, "--run_dir", tmp_path / "whole")
    assert outcome.code == 0, outcome.err
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm(*words, "--run_dir", tmp_path / "cut", "--trainer.callbacks+=tests.cli.test_resume.Crash")
    outcome = lit_llm(*words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last")
    assert outcome.code == 0, outcome.err
    names = ("step", "train/loss", "train/confident", "train/pseudo_label_accuracy", "val/loss")
    found = [
        [{name: row[name] for name in names if name in row} for row in read_metrics(tmp_path / run / "metrics.csv")]
        for run in ("whole", "cut")
    ]
    assert found[0] == found[1]
    assert {name for row in found[0] for name in row} == set(names)
    models = [load_file(tmp_path / run / "model/model.safetensors") for run in ("whole", "cut")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


class Plane(nn.Sequential):
    """A network for points in the plane."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, num_classes))

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points)


@pytest.mark.parametrize("kind", KINDS)
def test_unlabelled_examples_teach_what_the_labelled_ones_do_not(kind: type, tmp_path: Path) -> None:
    """Two wide clouds, one above the other; the only two labelled points suggest a slanted boundary."""
    draw = torch.Generator().manual_seed(0)
    classes = torch.arange(200) % 2
    cloud = torch.randn(200, 2, generator=draw) * torch.tensor([1.0, 0.15])
    cloud[:, 1] += 2.0 * classes - 1
    askew = {"points": torch.tensor([[-0.8, -0.9], [0.8, 0.9]]), "labels": torch.tensor([0, 1])}
    strong = {"points": cloud + 0.15 * torch.randn(200, 2, generator=draw)}
    batch = askew | {"unlabelled": {"points": cloud}, "unlabelled_strong": strong}
    right = {}
    for learnt in (kind, Classification):
        torch.manual_seed(0)
        options = {"decay": 0.9, "threshold": 0.8, "unlabelled_weight": 3.0} if learnt is kind else {}
        made = learnt(Plane, functools.partial(torch.optim.AdamW, lr=0.01), num_classes=2, **options)
        trainer(tmp_path, max_steps=200).fit(made, DataLoader([batch], batch_size=None))
        right[learnt] = (made.evaluated(cloud).argmax(-1) == classes).float().mean().item()
    assert right[kind] > 0.99
    assert right[Classification] < 0.95


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "model.threshold must be in [0, 1], but is 1.5"),
        ({"decay": 1.0}, "model.decay must be in [0, 1), but is 1.0"),
        ({"unlabelled_weight": -1.0}, "model.unlabelled_weight must be at least 0, but is -1.0"),
        ({"ramp_up_steps": -1}, "model.ramp_up_steps must be at least 0, but is -1"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        FixMatch(NETWORK, **arguments)


def test_data_without_unlabelled_examples_are_refused(tmp_path: Path) -> None:
    message = (
        "data must give unlabelled examples for FixMatch, but gives none; set data.unlabelled_ratio, or take "
        "Classification"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        trainer(tmp_path, max_steps=1).fit(FixMatch(NETWORK), datamodule=Examples(3))
