"""From text to an encoder, and from that to a classifier, with the command line."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tests.examples import BERT


def written(path: Path, objective: str, network: str, network_options: dict, data: str, data_options: dict) -> Path:
    """A run file."""
    made = {"class_path": f"lit_llm.models.{network}", "init_args": network_options}
    content = {
        "model": {"class_path": f"lit_llm.objectives.{objective}", "init_args": {"network": made}},
        "data": {"class_path": f"lit_llm.data.{data}", "init_args": data_options | {"validation_fraction": 0.2}},
        "trainer": {"max_steps": 2, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_encoder_that_was_trained_here_is_the_backbone_of_a_classifier(lit_llm, texts, reviews, tmp_path) -> None:
    words = {"path": str(texts), "tokenizer": "bert-bpe-300", "seq_len": 32, "batch_size": 4}
    network = ("pretrained_masked_lm.PretrainedMaskedLM", {"config": BERT})
    config = written(tmp_path / "x.yaml", "masked_lm.MaskedLM", *network, "text.TextData", words)
    outcome = lit_llm("fit", "--config", config, "--run_dir", tmp_path / "bert")
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "bert/results.json").read_text())
    assert {"val/loss", "val/accuracy", "val/perplexity", "test/loss"} <= results.keys()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "bert/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert/model")
    assert model(**tokenizer("the cat [MASK] on", return_tensors="pt")).logits.shape[-1] == len(tokenizer)

    labelled = {"path": str(reviews), "tokenizer": str(tmp_path / "bert/model"), "batch_size": 4, "max_seq_len": 32}
    network = ("pretrained_classifier.PretrainedClassifier", {"path": str(tmp_path / "bert")})
    config = written(tmp_path / "y.yaml", "classification.Classification", *network, "glue.GLUEData", labelled)
    still = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0"]
    outcome = lit_llm("fit", "--config", config, *still, "--run_dir", tmp_path / "classifier")
    assert outcome.code == 0, outcome.err
    found = load_file(tmp_path / "classifier/model/model.safetensors")
    for name, tensor in model.bert.state_dict().items():
        assert torch.equal(found[f"bert.{name}"], tensor)


def test_a_tokeniser_without_a_mask_token_is_refused_in_one_line(lit_llm, texts, tmp_path) -> None:
    words = {"path": str(texts), "tokenizer": "bytes", "seq_len": 32, "batch_size": 4}
    network = ("pretrained_masked_lm.PretrainedMaskedLM", {"config": BERT})
    config = written(tmp_path / "x.yaml", "masked_lm.MaskedLM", *network, "text.TextData", words)
    outcome = lit_llm("fit", "--config", config, "--run_dir", tmp_path / "run")
    assert outcome.code != 0
    assert outcome.last_line == (
        "lit-llm: error: data.tokenizer must have a mask token for MaskedLM, but bytes has none; set it to bert-uncased-bpe-8192"
    )
