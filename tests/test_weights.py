"""Weights in files; outputs are compared in tests/models/."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_llm.checkpoints import load_model, save_model
from lit_llm.weights import bytes_on_disk, copy_weights
from tests.writing import exactly


@pytest.fixture
def model(tiny_llama, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", tiny_llama())
    return tmp_path / "model"


def edit_weights(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_weights_are_exported_in_float32_whatever_they_were(tiny_llama, tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_llama().bfloat16())
    assert {tensor.dtype for tensor in load_file(tmp_path / "model/model.safetensors").values()} == {torch.float32}


NAMES = "model must hold the network's tensors and no others, but {} {}"


def test_a_missing_tensor_is_named(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=exactly(NAMES.format(model, "lacks model.norm.weight"))):
        load_model(model)
    edit_weights(model, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=exactly(NAMES.format(model, "lacks model.embed_tokens.weight and 1 more"))):
        load_model(model)


def test_an_extra_tensor_is_named(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({"model.layers.7.bias": torch.zeros(1)}))
    with pytest.raises(ValueError, match=exactly(NAMES.format(model, "also has model.layers.7.bias"))):
        load_model(model)


def test_a_tied_matrix_may_be_there_twice(tiny_llama, tmp_path: Path) -> None:
    network = tiny_llama(tie_embeddings=True)
    save_model(tmp_path / "model", network)
    twice = network.embed_tokens.weight.detach().clone()
    edit_weights(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": twice}))
    assert torch.equal(load_model(tmp_path / "model")[0].lm_head.weight, twice)


TIED = (
    "lm_head.weight must be the same as {}, to which the network ties it, but is another matrix in {}; set "
    "tie_word_embeddings in its config.json, or the network's tie_embeddings, to false"
)


@pytest.mark.parametrize(
    ("kind", "first"), [("tiny_llama", "model.embed_tokens.weight"), ("tiny_gpt2", "transformer.wte.weight")]
)
def test_a_head_of_its_own_is_refused_where_the_config_ties_it(kind: str, first: str, request, tmp_path: Path) -> None:
    model, network = tmp_path / "model", request.getfixturevalue(kind)(tie_embeddings=False)
    save_model(model, network)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=exactly(TIED.format(first, model))):
        load_model(model)
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert torch.equal(load_model(model)[0].lm_head.weight, network.lm_head.weight)


def test_a_head_of_its_own_does_not_start_a_network_whose_head_is_tied(tiny_llama) -> None:
    with pytest.raises(ValueError, match=exactly(TIED.format("embed_tokens.weight", "there"))):
        copy_weights(tiny_llama(), tiny_llama(tie_embeddings=True), "there")


def test_a_wrong_shape_is_named(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}))
    message = f"model.norm.weight must have the shape (32,) of the network, but has (31,) in {model}"
    with pytest.raises(ValueError, match=exactly(message)):
        load_model(model)


def test_a_model_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    message = f"model must hold weights as .safetensors, but {model} has none"
    with pytest.raises(FileNotFoundError, match=exactly(message)):
        load_model(model)


def test_weights_as_a_pickle_are_not_read(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(32)}, model / "pytorch_model.bin")
    message = f"model must hold weights as .safetensors, but {model} has none"
    with pytest.raises(FileNotFoundError, match=exactly(f"{message}; pickles are not read, save them as safetensors")):
        load_model(model)


def test_weights_in_several_files_are_read_and_a_missing_one_is_named(tiny_llama, tmp_path: Path) -> None:
    network, folder = tiny_llama(), tmp_path / "sharded"
    save_model(tmp_path / "model", network)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    size = bytes_on_disk(folder)
    assert size == sum(shard.stat().st_size for shard in shards)
    save_file({"other": torch.zeros(1)}, folder / "consolidated.safetensors")  # present in some directories
    assert bytes_on_disk(folder) == size
    torch.testing.assert_close(load_model(folder)[0].state_dict(), network.state_dict(), rtol=0, atol=0)
    shards[1].unlink()
    index = folder / "model.safetensors.index.json"
    message = f"model must hold all files that {index} names, but lacks {shards[1].name}"
    with pytest.raises(FileNotFoundError, match=exactly(message)):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_weights_are_refused_in_one_line(model: Path, kept: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"\Amodel must hold whole weights, but [^\n]+\Z") as caught:
        load_model(model)
    assert f"but {path} does not: " in str(caught.value)
