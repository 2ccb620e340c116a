import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lit_llm.checkpoint_files import AtomicCheckpointIO
from lit_llm.checkpoints import load_model, read_image_processor, save_model, unpacked
from lit_llm.data.tokenizer import byte_tokenizer, fingerprint, load_tokenizer, tokenizer_files, train_bpe
from lit_llm.models.llama import Llama
from lit_llm.models.pretrained import PretrainedCausalLM
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from tests.examples import BERT
from tests.writing import exactly


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Outputs are compared in tests/models/.


@pytest.fixture
def model(tiny_llama, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", tiny_llama(vocab_size=257), byte_tokenizer(), "# Card\n")
    return tmp_path / "model"


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_a_model_comes_with_its_tokenizer_and_card(model: Path) -> None:
    network, tokenizer = load_model(model)
    assert isinstance(network, Llama)
    assert not network.training
    assert fingerprint(tokenizer) == fingerprint(byte_tokenizer()) == fingerprint(AutoTokenizer.from_pretrained(model))
    assert (model / "README.md").read_text() == "# Card\n"
    config = json.loads((model / "config.json").read_text())
    assert {config[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {0}


@pytest.mark.parametrize("own", [True, False])
def test_transformers_ends_a_reply_with_the_turn_and_with_the_text(own: bool, tiny_llama, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    network = tiny_llama(vocab_size=len(tokenizer))
    if not own:
        network = PretrainedCausalLM(len(tokenizer), config={**network.to_hf_config(), "eos_token_id": 7})
    save_model(tmp_path, network, tokenizer)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert theirs.generation_config.eos_token_id == ends
    for end in ends:
        with torch.no_grad():
            theirs.lm_head.weight.zero_()
            theirs.lm_head.weight[end] = theirs.model.norm(theirs.model.embed_tokens.weight[ends[1]])
        reply = theirs.generate(torch.tensor([[5, ends[1]]]), max_new_tokens=4, do_sample=False)
        assert reply[0, 2:].tolist() == [end]


@pytest.mark.parametrize("template", [None, "{{ messages[-1]['content'] }}"])
def test_the_ends_that_came_with_the_weights_stay(template: str | None, tiny_llama, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = template
    config = {**tiny_llama(vocab_size=258).to_hf_config(), "model_type": "mistral"}
    save_model(tmp_path / "given", PretrainedCausalLM(258, config), tokenizer)
    file = tmp_path / "given/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [0, 7, 257]}))
    edit_config(tmp_path / "given", architectures=["MistralForCausalLM"])
    save_model(tmp_path / "written", *load_model(tmp_path / "given"))
    assert json.loads((tmp_path / "written/generation_config.json").read_text())["eos_token_id"] == [0, 257]


def mistral(tiny_llama, vocab_size: int) -> PretrainedCausalLM:
    config = {**tiny_llama(vocab_size=vocab_size).to_hf_config(), "model_type": "mistral"}
    return PretrainedCausalLM(vocab_size, {name: value for name, value in config.items() if "token_id" not in name})


@pytest.mark.parametrize("second", ["<bos>", "<fim_middle>"])
def test_the_architectures_end_is_none_of_a_network_that_came_without_weights(
    second: str, tiny_llama, tmp_path: Path
) -> None:
    vocabulary = {"<pad>": 0, "<eos>": 1, second: 2, "a": 3}  # Mistral's end token is 2
    roles = {"pad_token": "<pad>", "eos_token": "<eos>"} | ({"bos_token": second} if second == "<bos>" else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [])), **roles)
    tokenizer.add_special_tokens({"additional_special_tokens": [second]})
    save_model(tmp_path / "fresh", mistral(tiny_llama, 4), tokenizer)
    save_model(tmp_path / "again", *load_model(tmp_path / "fresh"))
    for folder in ("fresh", "again"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == 1


def test_of_the_ends_that_came_with_the_weights_those_stay_that_may_be_one(tiny_llama, tmp_path: Path) -> None:
    words = ["<unk>", "<bos>", "<mask>", "<|im_end|>", "<|endoftext|>", "<|end|>"]
    roles = {"unk_token": "<unk>", "bos_token": "<bos>", "mask_token": "<mask>", "eos_token": "<|im_end|>"}
    backend = Tokenizer(BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", **roles)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    save_model(tmp_path / "given", mistral(tiny_llama, 6), tokenizer)
    file = tmp_path / "given/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": list(range(6))}))
    save_model(tmp_path / "written", *load_model(tmp_path / "given"))
    assert json.loads((tmp_path / "written/generation_config.json").read_text())["eos_token_id"] == [3, 4, 5]


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}"])
def test_transformers_ends_a_text_where_the_tokenizer_does_not_where_the_architecture_would(
    template: str | None, tiny_llama, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    config = {**tiny_llama(vocab_size=257).to_hf_config(), "model_type": "mistral"}
    save_model(tmp_path, PretrainedCausalLM(257, {**config, "bos_token_id": 1, "eos_token_id": 2}), tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ends = theirs.generation_config
    assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (0, 0, 0)
    for token, text in ((0, [0]), (2, [2] * 4)):
        with torch.no_grad():
            theirs.lm_head.weight.zero_()
            theirs.lm_head.bias = nn.Parameter(torch.eye(257)[token])
        assert theirs.generate(torch.tensor([[0, 5]]), max_new_tokens=4, do_sample=False)[0, 2:].tolist() == text


def test_a_model_whose_chat_template_renders_no_prompt_is_written_all_the_same(tiny_llama, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    save_model(tmp_path, tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    assert load_model(tmp_path)[1].chat_template == tokenizer.chat_template


def test_a_tokenizer_is_unpacked_once_and_anew_where_a_file_of_it_is_gone(tmp_path: Path) -> None:
    tokenizer = train_bpe(["one red bird"] * 9, 270)
    tokenizer.save_pretrained(tmp_path)
    files = tokenizer_files(tmp_path)
    folder = unpacked(files)
    made = (folder / "tokenizer.json").stat().st_mtime_ns
    assert unpacked(files) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == made
    (folder / "tokenizer.json").unlink()
    assert fingerprint(load_tokenizer(unpacked(files))) == fingerprint(tokenizer)


def test_a_model_in_older_form_comes_with_its_tokenizer_too(tiny_gpt2, tmp_path: Path) -> None:
    tokenizer = train_bpe(["some words, some more"] * 3, 300)
    save_model(tmp_path, tiny_gpt2(vocab_size=len(tokenizer)), tokenizer)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    assert load_model(tmp_path)[1] is None
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    assert load_model(tmp_path)[1].encode("some more words") == tokenizer.encode("some more words")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))  # needs other files
    (tmp_path / "vocab.json").write_text("{}")
    assert load_model(tmp_path)[1] is None


def test_a_name_on_the_hub_stands_for_the_model_there(model: Path, monkeypatch) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        wanted = {path.name for pattern in allow_patterns for path in model.glob(pattern)}
        assert {path.name for path in model.iterdir()} - wanted <= {"README.md"}
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("someone/some-model.v1")[0].to_hf_config() == load_model(model)[0].to_hf_config()
    assert asked == ["someone/some-model.v1"]


def test_a_name_that_is_neither_here_nor_on_the_hub_is_said_in_one_line() -> None:
    line = (
        r"\Amodel must be [^\n]+ or a name on the hub, but no/where is no such place here, and from the hub: [^\n]+\Z"
    )
    with pytest.raises(FileNotFoundError, match=line):
        load_model("no/where")


def test_a_run_folder_stands_for_the_model_in_it(model: Path) -> None:
    assert load_model(model.parent)[0].to_hf_config() == load_model(str(model))[0].to_hf_config()


def test_a_checkpoint_of_an_objective_is_a_model_too(tiny_llama, tmp_path: Path) -> None:
    network = tiny_llama(vocab_size=257, tie_embeddings=True)
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "tie_embeddings": True}
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    files = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "tokenizer").iterdir()}
    checkpoint = {
        "network": {"class_path": "lit_llm.models.llama.Llama", "init_args": sizes, "size": 257},
        "state_dict": {f"network.{key}": value for key, value in network.state_dict().items()} | {"other": 1},
        "TextData": {"tokenizer": files},
    }
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "best.ckpt")
    again, tokenizer = load_model(tmp_path / "best.ckpt")
    assert same(dict(again.state_dict()), dict(network.state_dict()))
    assert again.lm_head.weight is again.embed_tokens.weight
    assert fingerprint(tokenizer) == fingerprint(byte_tokenizer())


def test_a_failed_export_leaves_the_old_model(model: Path, tiny_llama, monkeypatch) -> None:
    before = content(model)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_llm.weights.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tiny_llama(seed=1))
    assert content(model) == before
    assert [p.name for p in model.parent.iterdir()] == ["model"]


def test_a_new_export_replaces_all_of_the_old(model: Path, tiny_llama) -> None:
    (model / "leftover.txt").write_text("old")
    save_model(model, tiny_llama(seed=1))
    assert sorted(content(model)) == ["config.json", "model.safetensors"]


def test_a_network_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    message = "network must have a form that transformers knows, but is a Linear"
    with pytest.raises(TypeError, match=exactly(message)):
        save_model(tmp_path / "model", nn.Linear(2, 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architectures", [["BertForPreTraining"], [], None])
def test_an_unknown_architecture_is_said_with_those_there_are(model: Path, architectures: list[str] | None) -> None:
    edit_config(model, architectures=architectures)
    wanted = (architectures or [""])[0]
    with pytest.raises(ValueError, match=r"\Aarchitectures in config\.json must be one of ") as caught:
        load_model(model)
    ours = "CNN, GPT2LMHeadModel, LeNet, LlamaForCausalLM, MLP, MeanClassifier, PairClassifier, Qwen3ForCausalLM"
    wrapped = "a causal language model or a classifier or a masked language model or an encoder-decoder"
    assert str(caught.value).endswith(f" must be one of {ours}, or of transformers {wrapped}, but is {wanted!r}")


@pytest.mark.parametrize("path", ["", "nothing/here"])
def test_a_place_without_a_model_is_named(tmp_path: Path, path: str) -> None:
    message = (
        f"model must be a model directory, a run folder or a checkpoint file, but is {tmp_path / path}, which holds "
        f"no config.json"
    )
    with pytest.raises(FileNotFoundError, match=exactly(message)):
        load_model(tmp_path / path)


@pytest.mark.parametrize("config", ["", "{", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_config_that_is_not_whole_is_refused_in_the_grammar(model: Path, config: str) -> None:
    (model / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"\A[^\n]*config\.json[^\n]* must [^\n]+ but [^\n]+\Z"):
        load_model(model)


def test_a_checkpoint_without_a_network_is_refused(tmp_path: Path) -> None:
    saved = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, saved)
    message = f"model must be a checkpoint of an objective of this package, but {saved} describes no network"
    with pytest.raises(ValueError, match=exactly(message)):
        load_model(saved)


def test_a_checkpoint_cannot_name_anything_but_a_torch_module(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    recipe = {"class_path": "os.mkdir", "size": str(trap)}
    AtomicCheckpointIO().save_checkpoint({"network": recipe, "state_dict": {}}, tmp_path / "bad.ckpt")
    message = f"network in {tmp_path / 'bad.ckpt'} must be a torch module, but is os.mkdir"
    with pytest.raises(ValueError, match=exactly(message)):
        load_model(tmp_path / "bad.ckpt")
    assert not trap.exists()


@pytest.mark.parametrize("class_path", ["no_such_module.Network", "lit_llm.models.llama.NoSuchNetwork", "Llama"])
def test_a_checkpoint_that_names_no_class_is_refused_in_the_grammar(tmp_path: Path, class_path: str) -> None:
    recipe = {"class_path": class_path, "size": 7}
    AtomicCheckpointIO().save_checkpoint({"network": recipe, "state_dict": {}}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"\A[^\n]+ must [^\n]+ but [^\n]+\Z"):
        load_model(tmp_path / "bad.ckpt")


def test_a_model_of_images_comes_with_how_it_wants_them(tmp_path: Path) -> None:
    processor = {"size": {"height": 8, "width": 8}, "image_mean": [0.1], "image_std": [0.3]}
    config = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    save_model(tmp_path / "run/model", PretrainedClassifier(2, config=config), image_processor=processor)
    assert read_image_processor(tmp_path / "run") == read_image_processor(tmp_path / "run/model") == processor
    torch.save({"VisionData": {"image_processor": processor}, "state_dict": {}}, tmp_path / "x.ckpt")
    assert read_image_processor(tmp_path / "x.ckpt") == processor


def test_a_model_of_text_says_nothing_of_images(model: Path) -> None:
    assert read_image_processor(model) is None


def test_an_encoder_without_a_head_is_refused_and_what_it_could_be_does_not_name_it(tmp_path):
    AutoModel.from_config(AutoConfig.for_model(**BERT)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^architectures in config.json must be one of .*, but is 'BertModel'$"
    ) as refused:
        load_model(tmp_path)
    assert "an encoder of texts" not in str(refused.value)
