"""Two readings of a batch, with other units dropped, learn to agree."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.r_drop import RDrop
from tests.examples import BERT
from tests.writing import REPOSITORY, exactly

DROPS = BERT | {"hidden_dropout_prob": 0.3}


def made(config: dict, **options) -> RDrop:
    torch.manual_seed(0)
    found = RDrop(functools.partial(PretrainedClassifier, config=config), num_classes=3, **options)
    found.configure_model()
    return found


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(5, BERT["vocab_size"], (4, 7)), "labels": torch.tensor([0, 2, 1, 1])}


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_loss_is_that_of_two_passes_and_of_how_far_they_are_apart(batch, alpha):
    model = made(DROPS, alpha=alpha).train()
    torch.manual_seed(2)
    total, targets = model.loss(batch)
    torch.manual_seed(2)
    first, second = (model.network(input_ids=batch["input_ids"]).float() for _ in range(2))
    assert not first.equal(second)
    nats = sum(F.cross_entropy(logits, batch["labels"], reduction="sum") for logits in (first, second)) / 2
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    apart = [F.kl_div(a, b, log_target=True, reduction="sum") for a, b in ((p, q), (q, p))]
    torch.testing.assert_close(total, nats + alpha * sum(apart) / 2)
    assert targets == 4


def test_an_evaluation_reads_once_and_a_network_without_dropout_has_it_said(batch, caplog):
    model, plain = made(DROPS).eval(), made(BERT).train()
    nats = F.cross_entropy(model.network(input_ids=batch["input_ids"]).float(), batch["labels"], reduction="sum")
    torch.testing.assert_close(model.loss(batch)[0], nats)
    nats = F.cross_entropy(plain.network(input_ids=batch["input_ids"]).float(), batch["labels"], reduction="sum")
    for _ in range(2):
        torch.testing.assert_close(plain.loss(batch)[0], nats)
    message = "PretrainedClassifier has no dropout: RDrop reads each batch twice, and both answers are the same"
    assert caplog.messages == [message]


def test_it_is_laid_over_a_run_file(lit_llm, reviews, tmp_path):
    words = ["--config", REPOSITORY / "configs/finetuning/encoder_glue.yaml", "--data.path", reviews]
    words += ["--config", REPOSITORY / "configs/adaptation/r_drop.yaml", "--data.tokenizer", "bert-bpe-300"]
    for name, value in (DROPS | {"num_hidden_layers": 1}).items():
        words += [] if name == "vocab_size" else [f"--model.network.config.{name}", value]
    words += ["--trainer.max_steps", 2, "--data.max_seq_len", 16, "--run_dir", tmp_path / "run"]
    outcome = lit_llm("fit", *words)
    assert outcome.code == 0, outcome.err
    assert "dropout" not in outcome.err
    config = (tmp_path / "run/config.yaml").read_text()
    assert "lit_llm.objectives.r_drop.RDrop" in config
    assert "alpha: 1.0" in config


def test_a_negative_factor_is_refused():
    with pytest.raises(ValueError, match=exactly("model.alpha must be at least 0, but is -1.0")):
        RDrop(nn.Identity, alpha=-1.0)
