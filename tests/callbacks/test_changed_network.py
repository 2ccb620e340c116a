"""State about the network is reset when a callback replaces or changes the network."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_llm.adaptation import HeadOnly, LoRA
from lit_llm.callbacks.early_stopping import EarlyStopping
from lit_llm.callbacks.low_rank import LowRank
from lit_llm.callbacks.pruning import Pruning
from lit_llm.callbacks.quantization import QuantizationAwareTraining
from lit_llm.checkpoint_files import read_checkpoint
from lit_llm.checkpoints import load_model
from lit_llm.compression.low_rank import SVD
from lit_llm.compression.quantization import Int4WeightOnly
from lit_llm.compression.sparsity import Magnitude, sparsity_of
from lit_llm.objectives.classification import Classification
from tests.callbacks.test_spike_recovery import POISON, words
from tests.cli.test_resume import losses
from tests.examples import Examples
from tests.objectives.test_classification import NETWORK, trainer
from tests.writing import exactly

STILL = functools.partial(torch.optim.SGD, lr=0.0)

CHANGES = {
    "pruned at once": lambda: Pruning(Magnitude(0.9), start=0.5, end=0.5),
    "pruned bit by bit": lambda: Pruning(Magnitude(0.9), start=0.2, end=0.9, every_n_steps=1),
    "factorised": lambda: LowRank(SVD(rank=2), start=0.5),
    "quantised": lambda: QuantizationAwareTraining(Int4WeightOnly(group_size=16), delay=0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_another_network_than_the_one_that_is_exported_is_refused(change: str, tmp_path: Path) -> None:
    changed, made = change.split()[0], Classification(NETWORK)
    made.averages = True
    message = (
        f"model must evaluate the network that learns where that is {changed}, but Classification evaluates an average "
        f"of its weights; leave out WeightAverage, or take another objective"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        trainer(tmp_path, callbacks=[CHANGES[change]()]).fit(made, datamodule=Examples(3))
    message = f"model.adaptation must train the weights themselves where they are {changed}, but is a LoRA"
    with pytest.raises(ValueError, match=exactly(message)):
        trainer(tmp_path, callbacks=[CHANGES[change]()]).fit(
            Classification(NETWORK, adaptation=LoRA()), datamodule=Examples(3)
        )


@pytest.mark.parametrize("change", CHANGES)
def test_a_frozen_backbone_that_is_changed_is_measured_as_it_is(change: str, tmp_path: Path) -> None:
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    made = Classification(NETWORK, optimizer, adaptation=HeadOnly(cache_features=True))
    data, run = Examples(3), trainer(tmp_path, max_epochs=4, callbacks=[CHANGES[change]()])
    data.ordered_dataloader = functools.partial(ordered, data)
    run.fit(made, datamodule=data)
    found = run.callback_metrics["val/loss"]
    run.validate(made, datamodule=data, verbose=False)
    torch.testing.assert_close(found, run.callback_metrics["val/loss"])


def ordered(data: Examples, split: str, share: bool = True) -> Any:
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    loader.num_rows = 200
    return loader


@pytest.mark.parametrize("change", ["pruned at once", "factorised", "quantised"])
def test_early_stopping_waits_for_the_new_network_anew(change: str, tmp_path: Path) -> None:
    stopping = EarlyStopping(monitor="val/loss", mode="min", patience=3)
    run = trainer(tmp_path, max_epochs=8, callbacks=[CHANGES[change](), stopping])
    run.fit(Classification(NETWORK, STILL), datamodule=Examples(3))
    # Without a reset, three validations that are no better than the first would end the run after the fourth.
    assert run.current_epoch > 4


def test_a_run_does_not_go_back_to_before_its_network_was_pruned(lit_llm, tiny, tmp_path):
    method = {"class_path": "lit_llm.compression.sparsity.Magnitude", "init_args": {"sparsity": 0.5}}
    pruning = {"class_path": "lit_llm.callbacks.pruning.Pruning"}
    pruning["init_args"] = {"method": method, "start": 0.5, "end": 0.5}
    recovery = {"class_path": "lit_llm.callbacks.spike_recovery.SpikeRecovery"}
    recovery["init_args"] = {"window": 16, "patience": 3}
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks+": [pruning, recovery]}}))
    poisoned = [POISON, "--trainer.callbacks.first", 15, "--trainer.callbacks.last", 18]
    outcome = lit_llm("fit", *words(tiny, "--config", overlay, *poisoned, steps=24), "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "Step 18: the loss did not recover; returning to step 13" in outcome.err
    assert read_checkpoint(tmp_path / "run/checkpoints/good.ckpt")["global_step"] > 12
    network, _ = load_model(tmp_path / "run/model")
    assert sparsity_of(network, list(Magnitude().chosen(network))) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("callback", "options"),
    [
        ("pruning.Pruning", {"start": 0.5, "end": 0.5}),
        ("low_rank.LowRank", {"start": 0.5}),
    ],
    ids=["pruned", "factorised"],
)
def test_a_change_is_of_the_weights_that_a_bad_step_left(lit_llm, tiny, tmp_path, callback, options):
    found = []
    change = {"class_path": f"lit_llm.callbacks.{callback}", "init_args": options}
    recovery = {"class_path": "lit_llm.callbacks.spike_recovery.SpikeRecovery", "init_args": {"window": 4}}
    poisoned = [
        POISON,
        *("--trainer.callbacks.first", 3, "--trainer.callbacks.last", 4),
        "--trainer.callbacks.factor=1e9",
    ]
    for name, callbacks in {"before": [change, recovery], "after": [recovery, change]}.items():
        overlay = tmp_path / f"{name}.yaml"
        overlay.write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}))
        outcome = lit_llm("fit", *words(tiny, "--config", overlay, *poisoned, steps=8), "--run_dir", tmp_path / name)
        assert outcome.code == 0, outcome.err
        assert "1 steps with an outlying loss or gradient were skipped" in outcome.err
        checkpoint = read_checkpoint(tmp_path / name / "checkpoints/last.ckpt")
        found.append((losses(tmp_path / name), checkpoint["state_dict"]))
    (before, weights), (after, others) = found
    assert before == after
    assert weights.keys() == others.keys()
    assert all(torch.equal(t, others[name]) for name, t in weights.items())
