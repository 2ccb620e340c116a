from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from sklearn import metrics
from torch import nn

from lit_llm.checkpoints import load_model, save_model
from lit_llm.data.collation import Collation
from lit_llm.data.glue import GLUEData
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.causal_lm import CausalLM
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.regression import Regression
from tests.examples import BERT, Examples, example, together, twenty_tokens
from tests.writing import exactly

NETWORK = functools.partial(PretrainedClassifier, config=BERT)


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    shown = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, num_sanity_val_steps=0, **(shown | options))


def fitted(tmp_path: Path, data: Examples, steps: int = 1, **options: Any) -> Classification:
    made = Classification(NETWORK, functools.partial(torch.optim.AdamW, lr=0.01), **options)
    trainer(tmp_path, max_steps=steps, max_epochs=-1).fit(made, datamodule=data)
    return made


def test_it_learns_and_its_metrics_are_those_of_all_examples_whatever_the_batches(tmp_path: Path) -> None:
    data = Examples(3)
    made = fitted(tmp_path, data, steps=12)
    run = trainer(tmp_path)
    run.validate(made, datamodule=data, verbose=False)
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    whole = together([example(row, 3) for row in range(100, 111)])
    with torch.no_grad():
        logits = made.eval().logits(whole)
    truth, predicted = whole["labels"].numpy(), logits.argmax(-1).numpy()
    macro = {"average": "macro", "zero_division": 0}
    expected = {
        "val/accuracy": metrics.accuracy_score(truth, predicted),
        "val/precision": metrics.precision_score(truth, predicted, **macro),
        "val/recall": metrics.recall_score(truth, predicted, **macro),
        "val/f1": metrics.f1_score(truth, predicted, **macro),
        "val/mcc": metrics.matthews_corrcoef(truth, predicted),
        "val/loss": F.cross_entropy(logits, whole["labels"]).item(),
    }
    assert found == pytest.approx(expected, abs=1e-6)
    assert found["val/accuracy"] > 0.4
    run.test(made, datamodule=data, verbose=False)
    again = run.callback_metrics
    assert {name.removeprefix("test/") for name in again} == {name.removeprefix("val/") for name in found}


def test_the_network_knows_the_classes_by_name_and_so_does_what_is_saved(tmp_path: Path) -> None:
    made = fitted(tmp_path, Examples(3))
    save_model(tmp_path / "model", made.network)
    assert load_model(tmp_path / "model")[0].class_names == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_a_trained_network_keeps_the_names_of_its_classes_whatever_it_is_evaluated_on(tmp_path: Path, what) -> None:
    made, other = fitted(tmp_path, Examples(3)), Examples(3)
    other.class_names = ["class 2", "class 0", "class 1"]
    getattr(trainer(tmp_path), what)(made, datamodule=other)
    assert made.network.class_names == ["class 0", "class 1", "class 2"]


def test_a_network_is_told_the_names_of_its_classes_by_a_checkpoint_that_is_evaluated(tmp_path: Path) -> None:
    made, run = Classification(NETWORK), trainer(tmp_path, max_steps=1)
    run.fit(made, datamodule=Examples(3))
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = Classification(NETWORK, num_classes=3)
    trainer(tmp_path).predict(again, datamodule=Examples(3, known=False), ckpt_path=tmp_path / "x.ckpt")
    assert again.network.class_names == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_weighs_each_examples_smoothed_loss_by_its_class(tmp_path: Path, smoothing: float) -> None:
    made = fitted(tmp_path, Examples(3, counts=[12, 6, 3]), label_smoothing=smoothing, class_weights="balanced")
    batch = together([example(row, 3) for row in (0, 1, 3, 5)])
    total, count = made.loss(batch)
    weights = (21 / (3 * torch.tensor([12.0, 6.0, 3.0])))[batch["labels"]]  # as in scikit-learn
    each = F.cross_entropy(made.logits(batch), batch["labels"], reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(total / count, (weights * each).sum() / weights.sum())
    assert count >= len(batch["labels"])


@pytest.mark.parametrize("mixed", [False, True])
def test_under_autocast_a_weighed_and_smoothed_loss_has_all_its_bits(tmp_path: Path, mixed: bool) -> None:
    made = fitted(tmp_path, Examples(3, counts=[1201, 601, 3]), label_smoothing=0.2, class_weights="balanced")
    batch = together([example(row, 3) for row in (0, 1, 3, 5)])
    if mixed:
        batch["labels"] = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.1, 0.9]])[[0, 1, 0, 1]]
    logits = torch.randn(4, 3)
    made.read = lambda batch: logits
    expected = made.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made.loss(batch), expected)


def test_a_rare_class_is_not_likely_everywhere_for_being_smoothed(tmp_path: Path) -> None:
    made = fitted(tmp_path, Examples(2, counts=[640, 16]), label_smoothing=0.1, class_weights="balanced")
    batch = together([example(0, 2)])
    made.read = lambda batch: logits
    logits = torch.tensor([[math.log(19.0), 0.0]], requires_grad=True)  # logits of the smoothed target: 0.95 and 0.05
    made.loss(batch)[0].backward()
    torch.testing.assert_close(logits.grad, torch.zeros(1, 2))


def test_a_class_that_never_occurs_in_training_has_a_weight_too(tmp_path: Path) -> None:
    made = fitted(tmp_path, Examples(3, counts=[12, 12, 0]), class_weights="balanced", num_classes=4)
    assert made.weight_of_class.tolist() == [1.0, 1.0, 12.0, 12.0]


def test_weights_of_classes_are_exact_where_the_network_is_in_16_bits(tmp_path: Path) -> None:
    made = Classification(NETWORK, class_weights="balanced")
    data = Examples(3, counts=[1201, 601, 3])
    trainer(tmp_path, max_steps=1, precision="bf16-true").fit(made, datamodule=data)
    assert next(made.network.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(made.weight_of_class, 1201 / torch.tensor([1201.0, 601.0, 3.0]))


def test_predictions_are_probabilities_of_rows(tmp_path: Path) -> None:
    made = fitted(tmp_path, Examples(3))
    outputs = trainer(tmp_path).predict(made, datamodule=Examples(3, test_labels=False))
    assert torch.cat([output["rows"] for output in outputs]).tolist() == list(range(7))
    torch.testing.assert_close(torch.cat([output["probabilities"] for output in outputs]).sum(-1), torch.ones(7))


def test_a_network_for_several_classes_at_once_is_saved_as_one_for_a_single_class(tmp_path: Path, caplog) -> None:
    several = functools.partial(PretrainedClassifier, config=BERT | {"problem_type": "multi_label_classification"})
    made = Classification(several, functools.partial(torch.optim.AdamW, lr=0.01))
    with caplog.at_level(logging.INFO, "lit_llm"):
        trainer(tmp_path, max_steps=1).fit(made, datamodule=Examples(3))
    assert "The head was for multi_label_classification; now each example is of one class" in caplog.messages
    save_model(tmp_path / "model", made.network)
    assert not load_model(tmp_path / "model")[0].multi_label


@pytest.mark.parametrize("kind", [Classification, Regression])
def test_labels_of_the_other_kind_are_refused_with_the_objective_for_them(kind: type, tmp_path: Path) -> None:
    has, other = ("real numbers", "regression.Regression"), ("classes", "classification.Classification")
    has, other = has if kind is Classification else other
    wanted = "classes" if kind is Classification else "numbers"
    message = (
        f"data must have {wanted} as labels for {kind.__name__}, but has {has}; set model to lit_llm.objectives.{other}"
    )
    message += ", or write classes as whole numbers (1, not 1.0)" * (kind is Classification)
    with pytest.raises(ValueError, match=exactly(message)):
        trainer(tmp_path, max_steps=1).fit(kind(NETWORK), datamodule=Examples(None if kind is Classification else 3))


def test_smoothing_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=exactly("model.label_smoothing must be in [0, 1), but is 1.0")):
        Classification(NETWORK, label_smoothing=1.0)


def test_weights_that_need_counts_are_refused_without(tmp_path: Path) -> None:
    data = Examples(3)
    data.class_counts = None
    message = "data must say its class_counts for model.class_weights, but does not"
    with pytest.raises(ValueError, match=exactly(message)):
        fitted(tmp_path, data, class_weights="balanced")


def test_classes_that_the_data_balance_are_not_weighted_too(tmp_path: Path) -> None:
    data = Examples(3, counts=[12, 6, 3])
    data.balance_classes = True
    message = (
        "model.class_weights must be None where data.balance_classes is true, which balances the classes already, but "
        "is balanced; set one of the two"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        fitted(tmp_path, data, class_weights="balanced")
    assert fitted(tmp_path, data).weight_of_class is None


def spoil(made: nn.Module) -> None:
    with torch.no_grad():
        next(made.network.parameters()).fill_(torch.nan)


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
@pytest.mark.parametrize("kind", [Classification, Regression])
def test_predictions_that_are_no_numbers_are_refused(kind: type, what: str, tmp_path: Path) -> None:
    classes = 3 if kind is Classification else None
    made = kind(NETWORK, **({"num_classes": 3} if classes else {}))
    made.configure_model()
    spoil(made)
    with pytest.raises(
        FloatingPointError, match=r"\A(val/loss|test/loss|predictions) must be finite, but (is nan|are not)"
    ):
        getattr(trainer(tmp_path), what)(made, datamodule=Examples(classes))


def test_a_checkpoint_does_without_the_place_its_network_came_from(tmp_path: Path) -> None:
    save_model(tmp_path / "start", PretrainedClassifier(2, config=BERT))
    made = Classification(functools.partial(PretrainedClassifier, path=str(tmp_path / "start")))
    run = trainer(tmp_path, max_steps=1)
    run.fit(made, datamodule=Examples(3))
    run.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "start/config.json").unlink()
    again = Classification.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.network.class_names == ["class 0", "class 1", "class 2"]
    for name, tensor in made.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])


def test_weights_of_a_language_model_are_no_classifier_nor_the_other_way_round(tiny_llama, tmp_path: Path) -> None:
    save_model(tmp_path / "language", tiny_llama())
    save_model(tmp_path / "classifier", PretrainedClassifier(3, config=BERT))
    for kind, name, wanted, has in (
        (Classification, "language", "num_classes", "Llama, sized by vocab_size"),
        (CausalLM, "classifier", "vocab_size", "PretrainedClassifier, sized by num_classes"),
    ):
        message = (
            f"model.weights must be of a network sized by {wanted}, but {tmp_path / name} is a {has}; a backbone can be "
            f"named as model.network.path"
        )
        with pytest.raises(ValueError, match=exactly(message)):
            kind(weights=str(tmp_path / name)).configure_model()


def test_rows_longer_than_the_network_reads_are_refused(tmp_path: Path) -> None:
    data = Examples(3)
    data.max_seq_len = 65
    message = "data.max_seq_len must be at most the network's max_seq_len, 64, but is 65"
    with pytest.raises(ValueError, match=exactly(message)):
        fitted(tmp_path, data)


@pytest.mark.parametrize("padding", [None, 7])
def test_a_decoder_reads_a_text_to_its_end_where_the_tokeniser_has_no_padding(tmp_path: Path, padding) -> None:
    tokenizer = twenty_tokens()
    tokenizer.pad_token = None
    size = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": padding}
    start = PretrainedClassifier(2, config=size)
    torch.nn.init.normal_(start.model.score.weight)
    start.model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    texts = [f"{'a b ' * (row % 5)}{'kl'[row % 2]}" for row in range(24)]
    (tmp_path / "x.csv").write_text("\n".join(["text,label", *(f"{text},{text[-1]}" for text in texts)]))
    table = {"path": str(tmp_path / "x.csv"), "batch_size": 4, "validation_fraction": 0.0}
    data = GLUEData(**table, tokenizer=str(tmp_path / "start"))
    made = Classification(functools.partial(PretrainedClassifier, path=str(tmp_path / "start")), torch.optim.AdamW)
    trainer(tmp_path, max_steps=1).fit(made, datamodule=data)
    save_model(tmp_path / "model", made.network, tokenizer)
    again = PretrainedClassifier(2, path=str(tmp_path / "start"))
    again.load_state_dict(made.network.state_dict())
    again.recall_tokens(made.network.arguments["config"])
    for network in (made.network.eval(), load_model(tmp_path / "model")[0], again.eval()):
        read = Collation(texts[:5], None, None, tokenizer, 64)
        batches = [read.batch(np.array(rows)) for rows in (range(5), *([row] for row in range(5)))]
        logits, *alone = (network(input_ids=b["input_ids"], attention_mask=b["attention_mask"]) for b in batches)
        torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-5)
    served = load_model(tmp_path / "start")[0]
    assert served.config.pad_token_id == data.tokenizer.eos_token_id
