"""Training that starts from a checkpoint."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lit_llm.checkpoint_files import read_checkpoint
from lit_llm.checkpoints import load_model, save_model
from lit_llm.compression.low_rank import SVD
from lit_llm.data.text import TextData
from lit_llm.data.tokenizer import byte_tokenizer, train_bpe
from lit_llm.models.llama import Llama
from lit_llm.models.pretrained import PretrainedCausalLM
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.recurrent import LSTM
from lit_llm.models.rotary import YaRN
from lit_llm.objectives.causal_lm import CausalLM
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.regression import Regression
from tests.examples import BERT, Examples, example
from tests.writing import exactly

MISTRAL = {"model_type": "mistral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
MISTRAL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
SIZE = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "max_seq_len": 64}


@pytest.fixture
def model(tiny_llama, tmp_path: Path) -> Path:
    """A model with 300 tokens, more than its tokeniser has."""
    network = tiny_llama(vocab_size=300, rope_scaling=YaRN(2.0, 32), tie_embeddings=True)
    save_model(tmp_path / "model", network, byte_tokenizer())
    return tmp_path / "model"


def fit(objective: CausalLM, corpus: Path, tmp_path: Path, steps: int = 1, **changes) -> Trainer:
    data = TextData(**({"path": str(corpus), "tokenizer": "bytes", "seq_len": 16, "batch_size": 2} | changes))
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        max_steps=steps,
        limit_val_batches=0,
    )
    trainer.fit(objective, data)
    return trainer


def still(objective: type = CausalLM, **arguments) -> CausalLM:
    """An objective with a learning rate of 0."""
    return objective(optimizer=functools.partial(torch.optim.SGD, lr=0.0), **arguments)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("given", [False, True])
def test_it_starts_from_the_weights_and_its_checkpoints_do_without_them(model, corpus, tmp_path, given) -> None:
    before, _ = load_model(model)
    scaling = {"rope_scaling": YaRN(2.0, 32), "tie_embeddings": True}
    network = functools.partial(Llama, **SIZE, **scaling) if given else None
    made = still(network=network, weights=str(model))
    trainer = fit(made, corpus, tmp_path)
    assert same(made.network, before)
    assert made.network.training
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    shutil.rmtree(model)
    again, tokenizer = load_model(tmp_path / "x.ckpt")
    assert same(again, before)
    assert again.to_hf_config() == before.to_hf_config()
    assert tokenizer is not None
    assert same(CausalLM.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).network, before)
    assert read_checkpoint(tmp_path / "x.ckpt")["network"]["class_path"] == "lit_llm.models.llama.Llama"


def test_it_starts_from_any_network_of_transformers(corpus, tmp_path) -> None:
    before = PretrainedCausalLM(257, MISTRAL)
    save_model(tmp_path / "model", before, byte_tokenizer())
    made = still(weights=str(tmp_path / "model"))
    fit(made, corpus, tmp_path).save_checkpoint(tmp_path / "x.ckpt")
    shutil.rmtree(tmp_path / "model")
    again, _ = load_model(tmp_path / "x.ckpt")
    assert same(made.network, before)
    assert same(again, before)


def test_a_checkpoint_does_without_the_place_that_a_config_came_from(corpus, tmp_path) -> None:
    PretrainedCausalLM(257, MISTRAL).config.save_pretrained(tmp_path / "config")
    made = functools.partial(PretrainedCausalLM, config=str(tmp_path / "config"))
    objective = still(network=made)
    fit(objective, corpus, tmp_path).save_checkpoint(tmp_path / "x.ckpt")
    shutil.rmtree(tmp_path / "config")
    assert same(load_model(tmp_path / "x.ckpt")[0], objective.network)


def test_it_starts_from_a_checkpoint_of_a_network_that_is_not_exported(corpus, tmp_path) -> None:
    first = still(network=functools.partial(LSTM, d_model=16))
    fit(first, corpus, tmp_path).save_checkpoint(tmp_path / "x.ckpt")
    second = still(weights=str(tmp_path / "x.ckpt"))
    fit(second, corpus, tmp_path)
    assert same(second.network, first.network)


def test_a_checkpoint_to_go_on_from_beats_the_weights(model, corpus, tmp_path) -> None:
    first = CausalLM(weights=str(model))
    trainer = fit(first, corpus, tmp_path, steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    second = CausalLM(weights=str(model))
    data = TextData(path=str(corpus), tokenizer="bytes", seq_len=16, batch_size=2)
    Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=2,
        limit_val_batches=0, default_root_dir=tmp_path,
    ).fit(second, data, ckpt_path=tmp_path / "x.ckpt")  # fmt: skip
    assert same(second.network, first.network)
    assert not same(second.network, load_model(model)[0])


def test_another_tokenizer_is_refused_with_the_one_to_take(model, corpus, tmp_path) -> None:
    message = (
        "data.tokenizer must be the one that model.weights were trained with, but is another than that of "
        f"{model}; set data.tokenizer to {model}"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        fit(still(weights=str(model)), corpus, tmp_path, tokenizer="bpe-280")
    fit(still(weights=str(model)), corpus, tmp_path, tokenizer=str(model))


@pytest.mark.parametrize("before", [2, 5])
@pytest.mark.parametrize("given", [None, functools.partial(PretrainedClassifier, config=BERT)])
def test_weights_of_other_classes_get_a_new_head_which_is_said(tmp_path, caplog, before, given) -> None:
    source = PretrainedClassifier(before, config=BERT)
    source.class_names = [f"animal {n}" for n in range(before)]
    save_model(tmp_path / "model", source)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1, limit_val_batches=0)
    objective = still(Classification, network=given, weights=str(tmp_path / "model"))
    with caplog.at_level("INFO"):
        trainer.fit(objective, Examples(3))
    new = "model.classifier.bias, model.classifier.weight"
    assert f"The head is new, since {tmp_path / 'model'} has one of {before} classes: {new}" in caplog.messages
    assert objective.network.num_classes == objective.hparams["num_classes"] == 3
    assert objective.network.class_names == ["class 0", "class 1", "class 2"]
    assert same(objective.network.backbone, source.backbone)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert same(load_model(tmp_path / "x.ckpt")[0], objective.network)


def one_step() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1, limit_val_batches=1)


@pytest.mark.parametrize("given", [False, True])
def test_classes_in_another_order_are_found_by_their_names(tmp_path, given) -> None:
    source = PretrainedClassifier(3, config=BERT)
    source.class_names = ["CLASS 2", "CLASS 0", "CLASS 1"]
    save_model(tmp_path / "model", source)
    batch = {name: tensor for name, tensor in example(0, 3).items() if name in ("input_ids", "attention_mask")}
    expected = source.eval()(**batch)[:, [1, 2, 0]]
    network = functools.partial(PretrainedClassifier, config=BERT) if given else None
    for command in ("fit", "validate"):
        objective = still(Classification, network=network, weights=str(tmp_path / "model"))
        getattr(one_step(), command)(objective, Examples(3))
        assert objective.network.class_names == ["class 0", "class 1", "class 2"]
        assert torch.equal(objective.network.eval()(**batch), expected)


@pytest.mark.parametrize("given", [False, True])
def test_as_many_classes_of_other_names_get_a_new_head_and_are_not_evaluated_by_the_old(
    tmp_path, caplog, given
) -> None:
    source = PretrainedClassifier(3, config=BERT)
    source.class_names = ["cat", "dog", "hen"]
    save_model(tmp_path / "model", source)
    network = functools.partial(PretrainedClassifier, config=BERT) if given else None
    objective = still(Classification, network=network, weights=str(tmp_path / "model"))
    with caplog.at_level("INFO"):
        one_step().fit(objective, Examples(3))
    new = "model.classifier.bias, model.classifier.weight"
    classes = "the classes 'cat', 'dog', 'hen'"
    assert f"The head is new, since {tmp_path / 'model'} has one of {classes}: {new}" in caplog.messages
    assert same(objective.network.backbone, source.backbone)
    assert not torch.equal(objective.network.model.classifier.weight, source.model.classifier.weight)
    message = (
        f"model.weights must tell apart the data's classes, 'class 0', 'class 1', 'class 2', but {tmp_path / 'model'} "
        f"tells apart 'cat', 'dog', 'hen'; where they are the same, give them the data's names in id2label of its "
        f"config.json"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        one_step().validate(Classification(weights=str(tmp_path / "model")), Examples(3))


@pytest.mark.parametrize("names", [["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_a_head_of_classes_without_names_is_kept(tmp_path, names) -> None:
    source = PretrainedClassifier(3, config=BERT)
    source.class_names = names
    save_model(tmp_path / "model", source)
    objective = still(Classification, weights=str(tmp_path / "model"))
    one_step().fit(objective, Examples(3))
    assert same(objective.network, source)


def test_a_compressed_head_is_not_put_in_order(tmp_path) -> None:
    source = PretrainedClassifier(3, config=BERT)
    SVD(rank=1, layers=["model.classifier"]).apply(source)
    source.class_names = ["class 2", "class 0", "class 1"]
    save_model(tmp_path / "model", source)
    message = (
        f"model.weights must have a plain head for classes of other names or in another order, but that of "
        f"{tmp_path / 'model'} ('class 2', 'class 0', 'class 1') is compressed"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        one_step().validate(Classification(weights=str(tmp_path / "model")), Examples(3))


def test_values_are_learnt_by_a_new_head_on_weights_of_classes_but_not_evaluated_by_theirs(tmp_path, caplog) -> None:
    source = PretrainedClassifier(3, config=BERT)
    save_model(tmp_path / "model", source)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1, limit_val_batches=0)
    objective = still(Regression, weights=str(tmp_path / "model"))
    with caplog.at_level("INFO"):
        trainer.fit(objective, Examples(None))
    new = "model.classifier.bias, model.classifier.weight"
    assert f"The head is new, since {tmp_path / 'model'} has one of 3 classes: {new}" in caplog.messages
    assert objective.network.num_classes == objective.hparams["num_targets"] == 1
    assert same(objective.network.backbone, source.backbone)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert same(load_model(tmp_path / "x.ckpt")[0], objective.network)
    message = f"model.weights must have the num_targets of the data, 1, but {tmp_path / 'model'} has 3"
    with pytest.raises(ValueError, match=exactly(message)):
        Trainer(accelerator="cpu", logger=False).validate(
            Regression(weights=str(tmp_path / "model")), Examples(None), verbose=False
        )


def test_weights_of_fewer_classes_than_the_data_are_not_evaluated(tmp_path) -> None:
    save_model(tmp_path / "model", PretrainedClassifier(2, config=BERT))
    message = f"model.weights must have at least the num_classes of the data, 3, but {tmp_path / 'model'} has 2"
    with pytest.raises(ValueError, match=exactly(message)):
        Trainer(accelerator="cpu", logger=False).validate(
            Classification(weights=str(tmp_path / "model")), Examples(3), verbose=False
        )


def test_more_tokens_than_the_weights_have_are_refused(tiny_llama, corpus, tmp_path) -> None:
    save_model(tmp_path / "model", tiny_llama(vocab_size=100))  # without a tokeniser
    message = f"model.weights must have at least the vocab_size of the data, 257, but {tmp_path / 'model'} has 100"
    with pytest.raises(ValueError, match=exactly(message)):
        fit(still(weights=str(tmp_path / "model")), corpus, tmp_path)


def test_a_vocabulary_that_is_neither_the_datas_nor_the_weights_is_refused(model, corpus, tmp_path) -> None:
    with pytest.raises(ValueError, match=exactly("model.vocab_size must be that of model.weights, 300, but is 512")):
        fit(still(weights=str(model), vocab_size=512), corpus, tmp_path)


def test_weights_of_another_network_are_refused(model, corpus, tmp_path) -> None:
    message = rf"\Amodel must hold the network's tensors and no others, but {model} also has [^\n]+\Z"
    network = functools.partial(Llama, **SIZE | {"num_layers": 1, "tie_embeddings": True})
    with pytest.raises(ValueError, match=message):
        fit(still(network=network, weights=str(model)), corpus, tmp_path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("tiny_llama", {}), ("tiny_llama", {"tie_embeddings": True}), ("tiny_gpt2", {}), ("tiny_gpt2", {"bias": False})],
)
def test_transformers_own_network_takes_the_weights_of_one_written_here(
    request, kind, options, corpus, tmp_path
) -> None:
    before = request.getfixturevalue(kind)(vocab_size=257, **options)
    save_model(tmp_path / "model", before, byte_tokenizer())
    network = functools.partial(PretrainedCausalLM, config=str(tmp_path / "model"))
    made = still(network=network, weights=str(tmp_path / "model"))
    fit(made, corpus, tmp_path)
    ids = torch.arange(20)[None]
    assert type(made.network) is PretrainedCausalLM
    torch.testing.assert_close(made.network.eval()(ids), before(ids), atol=1e-5, rtol=1e-5)


def test_a_network_written_here_refuses_weights_that_need_what_it_lacks(corpus, tmp_path) -> None:
    source = PretrainedCausalLM(257, MISTRAL | {"model_type": "llama", "hidden_act": "gelu"})
    save_model(tmp_path / "model", source, byte_tokenizer())
    message = (
        f"model.network must be one that the weights of {tmp_path / 'model'} fit, but is a Llama: hidden_act in "
        f"config.json must be the default of plain Llama or Qwen3, but is 'gelu'; leave it out to take theirs"
    )
    network = functools.partial(Llama, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, d_ff=32)
    with pytest.raises(ValueError, match=exactly(message)):
        fit(still(network=network, weights=str(tmp_path / "model")), corpus, tmp_path)
    again = functools.partial(PretrainedCausalLM, config=str(tmp_path / "model"))
    made = still(network=again, weights=str(tmp_path / "model"))
    fit(made, corpus, tmp_path)
    assert same(made.network, source)


def test_neither_network_nor_weights_is_refused() -> None:
    message = "model.network must be given where there are no model.weights to start from, but is None"
    with pytest.raises(ValueError, match=exactly(message)):
        CausalLM()


def test_a_run_goes_on_without_what_it_started_from(lit_llm, tiny_llama, tiny, texts, tmp_path) -> None:
    tokenizer = train_bpe((path.read_text(encoding="utf-8") for path in texts.iterdir()), 280)
    save_model(tmp_path / "start", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    words = ("--model.weights", tmp_path / "start", "--data.tokenizer", tmp_path / "start")
    options = tiny[:2] + tiny[8:]  # without the network's options
    outcome = lit_llm("fit", *options, "--model.network", "null", *words, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "Starting from the weights of" in outcome.err
    config = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "start/model.safetensors").unlink()
    go_on = ("--run_dir", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", "8")
    outcome = lit_llm("fit", *go_on)
    assert outcome.code == 0, outcome.err
    assert f"weights: {tmp_path / 'start'}" in config
    assert f"weights: {tmp_path / 'start'}" in (tmp_path / "run/config.yaml").read_text()
