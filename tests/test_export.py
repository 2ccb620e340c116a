import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lit_llm import export as exporting
from lit_llm.checkpoints import Model, save_model
from lit_llm.compression.low_rank import SVD
from lit_llm.compression.quantization import Int4WeightOnly, Int8Dynamic, Int8DynamicInt4, Int8WeightOnly
from lit_llm.compression.sparsity import Magnitude
from lit_llm.data.image_cache import read_image
from lit_llm.data.image_processor import ImageProcessor
from lit_llm.data.tokenizer import byte_tokenizer, train_bert_bpe
from lit_llm.export import Exported, export, export_model
from lit_llm.models.llama import Llama
from lit_llm.models.mlp import MLP
from lit_llm.models.pretrained import PretrainedCausalLM
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_masked_lm import PretrainedMaskedLM
from lit_llm.models.pretrained_pooling import PairClassifier
from lit_llm.models.pretrained_seq2seq import PretrainedSeq2Seq
from lit_llm.models.recurrent import LSTM
from lit_llm.models.rotary import Llama3Scaling, YaRN
from lit_llm.products import MAX_QUERIES
from tests.examples import BERT, T5
from tests.image_batches import RESNET, VIT
from tests.images import noise
from tests.test_contracts import (
    CLASSIFIERS,
    ENCODERS,
    LANGUAGE_MODELS,
    MISTRAL,
    OF_IMAGES,
    SMALL,
    VOCAB,
    awake,
    small,
)
from tests.writing import REPOSITORY

SHAPES = [(1, 1), (1, 4), (4, 9), (2, 20)]
WITH_SEPARATOR = BERT | {"sep_token_id": 2, "pad_token_id": 0}
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS = {
    "grouped queries": lambda: Llama(VOCAB, **SMALL | {"num_heads": 4, "num_kv_heads": 2}, qk_norm=True),
    "YaRN": lambda: Llama(VOCAB, **SMALL, rope_scaling=YaRN(2.0, 16), tie_embeddings=True),
    "Llama 3": lambda: Llama(VOCAB, **SMALL, rope_scaling=Llama3Scaling(2.0, original_max_seq_len=64)),
    "Mistral": lambda: PretrainedCausalLM(VOCAB, MISTRAL),
    "GPT-NeoX": lambda: PretrainedCausalLM(VOCAB, {"model_type": "gpt_neox", **SIZE}),
    "ModernBERT": lambda: PretrainedMaskedLM(
        VOCAB,
        {"model_type": "modernbert", "local_attention": 4, **dict.fromkeys(("pad_token_id", "bos_token_id"), 0), **SIZE}
        | dict.fromkeys(("eos_token_id", "cls_token_id", "sep_token_id"), 2),
    ),
    "RoBERTa": lambda: PretrainedClassifier(3, config=BERT | {"model_type": "roberta", "pad_token_id": 0}),
    "ViT": lambda: PretrainedClassifier(3, config=VIT | {"image_size": 8, "num_channels": 1}),
    "ResNet": lambda: PretrainedClassifier(3, config=RESNET | {"num_channels": 1, "image_size": 32}),
}


def made(kind: type) -> nn.Module:
    if kind in OF_IMAGES:
        return awake(kind(3))
    config = {"config": WITH_SEPARATOR}
    of_tokens = small(kind) if kind in LANGUAGE_MODELS else config
    return awake(kind(3, **config) if kind in CLASSIFIERS else kind(VOCAB, **of_tokens))


def model(network: nn.Module, tokenizer: Any = None) -> Model:
    return Model(network.eval(), tokenizer, {}, None)


def others(network: nn.Module, batch: int, seq: int) -> dict[str, torch.Tensor]:
    """Inputs with other shapes and content than in the export."""
    if hasattr(network, "image_shape"):
        _, height, width = network.image_shape
        return {"pixel_values": torch.randn(batch, network.image_shape[0], height or 32, width or 32)}
    ids, mask = torch.randint(3, VOCAB, (batch, seq)), torch.ones(batch, seq, dtype=torch.long)
    ids[:, seq // 2] = 2
    if seq > 4 and not hasattr(network, "new_cache"):
        mask[0, 3:], ids[0, 3:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@torch.no_grad()
def expected_of(network: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if hasattr(network, "logits_at"):
        return network.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return network(inputs["input_ids"]) if hasattr(network, "new_cache") else network(**inputs)


def require_parity(network: nn.Module, folder: Path, form: str) -> Exported:
    if form == "onnx":
        pytest.importorskip("onnxscript")
    of_any_size = hasattr(network, "image_shape") and network.image_shape[1] is None
    processor = ImageProcessor((1, 32, 32), [0.1], [0.3]).to_hf() if of_any_size else None
    found = export_model(model(network), folder, form, processor)
    network = network.eval()
    if form == "torch":
        program = torch.export.load(found.file)
        names = list(program.call_spec.in_spec.children()[1].context) or [
            spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"
        ]
        module = program.module()

        def answer(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return module(**{name: inputs[name] for name in names})
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(found.file))
        assert [node.name for node in session.get_outputs()] == ["logits"]
        names = [node.name for node in session.get_inputs()]
        assert all(node.shape[0] == "batch" for node in session.get_inputs())

        def answer(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])

    images = hasattr(network, "image_shape")
    of_one = hasattr(network, "new_cache")
    assert names == (["pixel_values"] if images else ["input_ids"] if of_one else ["input_ids", "attention_mask"])
    for shape in SHAPES:
        inputs = others(network, *shape)
        if "token_type_ids" in inputs and not of_one:
            inputs.pop("token_type_ids")
        logits, read = expected_of(network, inputs), answer(inputs)
        if logits.ndim == 3:
            logits, read = (x[inputs["attention_mask"].bool()] for x in (logits, read))
        assert read.dtype == torch.float32
        assert (read - logits).abs().max() <= 1e-3 * found.spread
    return found


FAST = [(MLP, "torch"), (MLP, "onnx")]
ALL = [(kind, form) for kind in [*LANGUAGE_MODELS, *ENCODERS, *CLASSIFIERS, *OF_IMAGES] for form in ("torch", "onnx")]


@pytest.mark.parametrize(("kind", "form"), FAST)
def test_the_file_answers_as_the_network_of_any_shape_of_input(kind, form, tmp_path):
    found = require_parity(made(kind), tmp_path / "out", form)
    assert found.num_bytes == found.file.stat().st_size
    assert found.milliseconds > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [pair for pair in ALL if pair not in FAST])
def test_every_network_of_the_package_is_exported_with_any_shape_of_input(kind, form, tmp_path):
    require_parity(made(kind), tmp_path / "out", form)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize("name", OTHERS)
def test_so_are_their_kin_and_those_of_transformers(name, form, tmp_path):
    require_parity(awake(OTHERS[name]()), tmp_path / "out", form)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped queries", "Mistral", "RoBERTa"])
def test_an_export_asks_no_length_also_where_a_training_attended_by_products_up_to_one(name, tmp_path, monkeypatch):
    monkeypatch.setitem(MAX_QUERIES, torch.float32, (8, 8))  # as by `multiply_by_onednn`, for the whole process
    require_parity(awake(OTHERS[name]()), tmp_path / "out", "torch")


def llama(**changes: Any) -> nn.Module:
    return awake(Llama(VOCAB, **{"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64} | changes))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize(
    "method",
    [SVD(rank=4), Magnitude(sparsity=0.5), Int8WeightOnly(["*"]), Int4WeightOnly(["*"], group_size=16)],
    ids=lambda method: type(method).__name__,
)
def test_so_is_what_was_compressed_and_integers_stay_small(method, form, tmp_path):
    if isinstance(method, Int8WeightOnly | Int4WeightOnly):
        pytest.importorskip("torchao")
    network = llama(d_model=128, d_ff=256)
    method.apply(network)
    found = require_parity(network, tmp_path / "out", form)
    whole = 4 * sum(p.numel() for p in llama(d_model=128, d_ff=256).parameters())
    if isinstance(method, Int8WeightOnly | Int4WeightOnly):
        assert found.num_bytes < 0.8 * whole  # the rest is the graph


@pytest.mark.parametrize("method", [Int8Dynamic(), Int8DynamicInt4(group_size=16)])
def test_layers_that_round_what_they_read_are_refused(method, tmp_path):
    pytest.importorskip("torchao")
    network = llama()
    method.apply(network)
    message = (
        f"model must have no more than weights rounded to be exported, but {type(method).__name__} rounds what layers "
        "read, too; compress with Int8WeightOnly or Int4WeightOnly"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        export_model(model(network), tmp_path / "out", "torch")
    assert not any(tmp_path.iterdir())


def test_no_file_tells_where_the_code_lay(tmp_path):
    found = export_model(model(llama()), tmp_path / "out", "torch")
    with zipfile.ZipFile(found.file) as file:
        assert not any(str(REPOSITORY).encode() in file.read(name) for name in file.namelist())


def test_a_path_may_be_text(tmp_path):
    save_model(str(tmp_path / "model"), awake(MLP(3)))
    found = export(str(tmp_path / "model"), str(tmp_path / "out"), "torch")
    assert found.file == tmp_path / "out/model.pt2"


def test_a_network_that_writes_in_steps_is_refused(tmp_path):
    save_model(tmp_path / "model", PretrainedSeq2Seq(VOCAB, config=T5))
    with pytest.raises(
        ValueError, match=r"^model must answer in one pass to be exported, but .+ is an encoder-decoder"
    ):
        export(tmp_path / "model", tmp_path / "out", "torch")


def test_what_torch_cannot_export_is_said_in_one_line(tmp_path):
    class Counts(MLP):
        def hidden(self, x: torch.Tensor) -> torch.Tensor:
            return super().hidden(x) * len(x.flatten().unique())

    with pytest.raises(
        ValueError, match=r"^network must be one that torch.export takes .+, but a Counts is not: "
    ) as e:
        export_model(model(Counts(3)), tmp_path / "out", "torch")
    assert "\n" not in str(e.value)
    assert not any(tmp_path.iterdir())


def test_a_file_that_answers_otherwise_leaves_nothing_behind(tmp_path, monkeypatch):
    opened = exporting._open
    monkeypatch.setattr(exporting, "_open", lambda *args: lambda inputs: opened(*args)(inputs) + 0.1)
    with pytest.raises(ValueError, match=r"^logits of the file must be the network's within 0.001 of their spread, "):
        export_model(model(MLP(3)), tmp_path / "out", "torch")
    assert not any(tmp_path.iterdir())


def test_without_the_extra_the_line_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    message = (
        "package onnx must be installed to export ONNX, but is not; pip install 'lit-llm[export]', or give "
        "--format torch"
    )
    with pytest.raises(ModuleNotFoundError, match=f"^{message.replace('[', '.').replace(']', '.')}$"):
        export_model(model(MLP(3)), tmp_path / "out")


def printed(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    names: dict[str, Any] | None = None,
) -> str:
    """Output of the program in the folder's README; its variables are stored in `names`."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    program = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in program.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(program, {} if names is None else names)
    return capsys.readouterr().out.strip()


PROCESSOR = ImageProcessor((1, 28, 28), [0.1], [0.3]).to_hf()
TEXTS = ["a text and another one, and texts"] * 4
EXAMPLES = {
    "language model": lambda: (awake(Llama(258, **SMALL)), byte_tokenizer(), None),
    "recurrent": lambda: (awake(LSTM(258, d_model=16)), byte_tokenizer(), None),
    "no tokeniser": lambda: (awake(Llama(VOCAB, **SMALL)), None, None),
    "masked": lambda: (awake(PretrainedMaskedLM(300, BERT)), train_bert_bpe(TEXTS, 280), None),
    "classifier": lambda: (
        awake(CLASSIFIERS[0](3, config=BERT | {"vocab_size": 300})),
        train_bert_bpe(TEXTS, 280),
        None,
    ),
    "regression": lambda: (
        awake(CLASSIFIERS[0](1, config=BERT | {"vocab_size": 300})),
        train_bert_bpe(TEXTS, 280),
        None,
    ),
    "pairs": lambda: (
        awake(PairClassifier(1, config=BERT | {"vocab_size": 300, "sep_token_id": 3})),
        train_bert_bpe(TEXTS, 280),
        None,
    ),
    "images": lambda: (awake(MLP(3, class_names=["cat", "dog", "hen"])), None, PROCESSOR),
}


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys) -> Callable[[str, str], str]:
    def show(name: str, form: str) -> str:
        (network, tokenizer, processor), folder = EXAMPLES[name](), tmp_path / "out"
        export_model(model(network, tokenizer), folder, form, processor)
        if processor:
            assert (folder / "preprocessor_config.json").is_file()
            Image.new("RGB", (40, 30), "gray").save(folder / "image.png")
        if tokenizer is not None:
            assert (folder / "tokenizer.json").is_file()
        return printed(folder, monkeypatch, capsys)

    return show


def test_the_readme_has_a_program_that_runs_and_names_classes(shown):
    assert shown("images", "torch") in ("cat", "dog", "hen")


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "length"), [(None, 64), (9, 9)])
def test_the_program_cuts_texts_that_are_too_long(cut, length, tmp_path, monkeypatch, capsys):
    network, tokenizer, _ = EXAMPLES["classifier"]()
    if cut is not None:
        tokenizer.model_max_length = cut
    export_model(model(network, tokenizer), tmp_path, "torch")
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace('"another text"', '"another text" * 99'))
    assert printed(tmp_path, monkeypatch, capsys, names := {})
    assert len(names["batch"]["input_ids"][1]) == length
    assert names["batch"]["input_ids"][1][-1] == tokenizer.sep_token_id


def test_the_program_reads_images_as_training_does(tmp_path, monkeypatch, capsys):
    network, _, processor = EXAMPLES["images"]()
    export_model(model(network, None), tmp_path, "torch", processor)
    grey, exif, file = noise(0, 28, 28), Image.Exif(), tmp_path / "image.png"
    exif[0x0112] = 6
    deep = Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) + 77)
    for image, how in ((grey, {}), (grey, {"exif": exif}), (deep, {}), (deep, {"exif": exif})):
        image.save(file, **how)
        printed(tmp_path, monkeypatch, capsys, names := {})
        expected = (read_image({"path": str(file)}, 1, 28, 28) / 255 - 0.1) / 0.3
        np.testing.assert_allclose(names["pixels"].transpose(2, 0, 1), expected, atol=1e-5)


@pytest.mark.slow
def test_the_readme_says_of_a_number_and_of_pairs_what_they_are(shown, tmp_path):
    assert shown("pairs", "torch")
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "- gives `logits`: float32, batch × 1, the predicted value" in text
    assert '["a text", "another text"], ["the text beside it", "the other\'s"]' in text


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_each_kind_of_network_has_such_a_program(name, form, shown):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    assert shown(name, form)
