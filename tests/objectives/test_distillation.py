from __future__ import annotations

import functools
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from lit_llm.batch import IGNORE_INDEX
from lit_llm.checkpoints import load_model, save_model
from lit_llm.data.cache import cache_folder
from lit_llm.data.image_processor import ImageProcessor
from lit_llm.data.tokenizer import byte_tokenizer
from lit_llm.models.llama import Llama
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.distillation import CausalLMDistillation, ClassificationDistillation, MaskedLMDistillation
from lit_llm.objectives.divergences import ReverseKL
from tests.examples import BERT, Examples, example, together
from tests.image_batches import VIT, Images
from tests.writing import exactly

SMALL = {"d_model": 16, "num_layers": 1, "num_heads": 4, "max_seq_len": 64}


@pytest.fixture
def bert(tmp_path):
    """A teacher of three classes."""
    network = PretrainedClassifier(3, config=BERT | {"num_hidden_layers": 3, "hidden_dropout_prob": 0.3})
    network.class_names = ["class 0", "class 1", "class 2"]
    save_model(tmp_path / "bert", network)
    return tmp_path / "bert"


@pytest.fixture
def llama(tmp_path, tiny_llama):
    """A teacher of 257 tokens."""
    save_model(tmp_path / "llama", tiny_llama(vocab_size=257), byte_tokenizer())
    return tmp_path / "llama"


def trainer(folder, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0, limit_val_batches=0,
        **{"max_epochs": 1} | options,
    )  # fmt: skip


def student(bert, config: dict[str, Any] = BERT, **options: Any) -> ClassificationDistillation:
    return ClassificationDistillation(
        functools.partial(PretrainedClassifier, config=config), teacher=str(bert), **options
    )


def test_the_loss_is_hintons(bert, tmp_path):
    seen = []

    class Watched(ClassificationDistillation):
        def loss(self, batch):
            total, targets = super().loss(batch)
            seen.append((batch, self.network(**self._read(batch)), total, targets))
            return total, targets

        def _read(self, batch):
            return {name: batch[name] for name in ("input_ids", "attention_mask")}

    made = Watched(
        functools.partial(PretrainedClassifier, config=BERT), teacher=str(bert), temperature=3.0, teacher_weight=0.7
    )
    trainer(tmp_path, max_steps=1).fit(made, datamodule=Examples())
    batch, logits, total, targets = seen[0]
    teacher, _ = load_model(bert)
    taught = teacher(**made._read(batch))
    soft = 9 * F.kl_div((logits / 3).log_softmax(-1), (taught / 3).softmax(-1), reduction="sum")
    expected = 0.3 * F.cross_entropy(logits, batch["labels"], reduction="sum") + 0.7 * soft
    torch.testing.assert_close(total, expected)
    assert targets == 8


def test_the_loss_of_tokens_is_hintons_at_each_label(llama, tmp_path):
    made = CausalLMDistillation(
        functools.partial(Llama, **SMALL), vocab_size=257, teacher=str(llama), divergence=ReverseKL(), temperature=1.5
    )
    made.trainer = trainer(tmp_path)
    made.trainer.state.fn = "fit"
    made.configure_model()
    torch.nn.init.normal_(made.network.lm_head.weight)
    batch = {"input_ids": torch.randint(257, (2, 40)), "labels": torch.randint(257, (2, 40))}
    batch["labels"][1, 5:] = IGNORE_INDEX
    total, targets = made.loss(batch)
    kept = batch["labels"] != IGNORE_INDEX
    q, p = ((f(batch["input_ids"])[kept] / 1.5).log_softmax(-1) for f in (made.network, made.teacher.network))
    hard = F.cross_entropy(made.network(batch["input_ids"])[kept], batch["labels"][kept], reduction="sum")
    torch.testing.assert_close(total, 0.5 * hard + 0.5 * 2.25 * (q.exp() * (q - p)).sum(), rtol=1e-4, atol=1e-3)
    assert targets == 45


def test_the_teacher_learns_nothing_and_is_left_out_of_everything(bert, tmp_path):
    made = student(bert, hidden_weight=1.0, attention_weight=1.0)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(made, datamodule=Examples())
    before, after = load_model(bert)[0].state_dict(), made.teacher.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not made.teacher.network.training
    learning = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert learning.isdisjoint(id(p) for p in made.teacher.network.parameters())
    assert learning >= {id(p) for p in made.projections.parameters()}
    run.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    owned = {name.split(".")[0] for name in state}
    assert owned == {"network", "projections"}
    (bert / "model.safetensors").unlink()
    network, _ = load_model(tmp_path / "x.ckpt")
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in made.network.parameters())


def test_a_student_comes_closer_to_its_teacher_inside_and_out(bert, tmp_path):
    """With all layers and weights of the teacher the distance is zero; training from another start reduces it."""
    batch = together([example(row, 3) for row in range(8)])

    def distance(made: ClassificationDistillation) -> float:
        with torch.no_grad():
            return float(made.loss(batch)[0])

    weights = {"teacher_weight": 1.0, "hidden_weight": 1.0, "attention_weight": 1.0}
    made = student(bert, BERT | {"num_hidden_layers": 3}, **weights, inherit=True)
    trainer(tmp_path, max_steps=1, limit_train_batches=0).fit(made, datamodule=Examples())
    assert distance(made) < 1e-5
    far = student(bert, **weights)
    trainer(tmp_path, max_steps=1, limit_train_batches=0).fit(far, datamodule=Examples())
    first = distance(far)
    trainer(tmp_path, max_epochs=10).fit(far, datamodule=Examples())
    assert distance(far) < 0.7 * first


def test_what_was_said_is_read_from_disk_and_the_teacher_left_alone(bert, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    calls = []

    def fit(**options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        made = student(bert, **options)
        run = trainer(tmp_path, max_epochs=3)
        calls.clear()
        made.on_fit_start = lambda: made.teacher.network.register_forward_pre_hook(lambda *args: calls.append(1))
        run.fit(made, datamodule=Examples())
        return made.network.state_dict()

    plain = fit()
    assert len(calls) == 9
    kept = fit(cache_top_k=3)
    assert len(calls) == 3
    for name, tensor in plain.items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-2, atol=1e-2)
    file = next((tmp_path / "cache/teachers").rglob("*.bin"))
    with file.open("ab") as half:
        half.write(b"half a record")
    again = fit(cache_top_k=3)
    assert calls == []
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    fit(cache_top_k=2)
    assert len(calls) == 3


def test_rows_that_do_not_come_again_as_they_were_are_not_kept(bert, tmp_path):
    class Augmented(Examples):
        augmentation = "crops"

    with pytest.raises(
        ValueError,
        match=r"^model.cache_top_k must be None where rows do not come again as they were, but data.augmentation is 'crops'$",
    ):
        trainer(tmp_path).fit(student(bert, cache_top_k=3), datamodule=Augmented())
    with pytest.raises(
        ValueError, match=r"^model.cache_top_k must be None where other tokens are hidden at each step, but is 4$"
    ):
        MaskedLMDistillation(torch.nn.Identity, teacher=str(bert), cache_top_k=4)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("temperature", 0.0, r"^model.temperature must be above 0, but is 0.0$"),
        ("teacher_weight", 1.5, r"^model.teacher_weight must be in \[0, 1\], but is 1.5$"),
        ("hidden_weight", -1.0, r"^model.hidden_weight must be at least 0, but is -1.0$"),
        ("cache_top_k", 0, r"^model.cache_top_k must be at least 1, but is 0$"),
    ],
)
def test_values_out_of_range_are_refused(bert, option, value, message):
    with pytest.raises(ValueError, match=message):
        student(bert, **{option: value})


def test_what_inside_cannot_be_compared_is_refused(bert, tmp_path):
    made = student(bert, BERT | {"num_attention_heads": 4}, attention_weight=1.0)
    with pytest.raises(
        ValueError,
        match=r"^model.attention_weight must be 0 where heads are not as many as the teacher's, but block 0 has 4 and the teacher's 0 has 2$",
    ):
        trainer(tmp_path).fit(made, datamodule=Examples())
    with pytest.raises(ValueError, match=r"^model.cache_top_k must be None with hidden_weight"):
        student(bert, hidden_weight=1.0, cache_top_k=3)


def test_attention_of_blocks_that_are_computed_again_is_not_compared(llama, tmp_path):
    made = CausalLMDistillation(
        functools.partial(Llama, **SMALL, activation_checkpointing=True),
        **{"vocab_size": 257, "teacher": str(llama), "attention_weight": 0.5},
    )
    made.trainer = trainer(tmp_path)
    made.trainer.state.fn = "fit"
    message = (
        "model.attention_weight must be 0 where blocks are computed again in the backward pass, but is 0.5; set "
        "model.network.activation_checkpointing to false"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        made.configure_model()


def test_a_teacher_of_images_is_shown_them_as_it_was_trained_with_and_what_it_said_is_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    config = VIT | {"image_size": 8, "num_channels": 1, "num_hidden_layers": 1}
    data, shown = Images(), {}
    data.image_processor = ImageProcessor((1, 8, 8), [0.5], [0.25]).to_hf()
    pixels = data.batch("train", [0, 1, 2])["pixel_values"]  # of each (pixel - 0.5) / 0.25
    for mean, std in ((0.5, 0.25), (0.25, 0.5)):
        own = ImageProcessor((1, 8, 8), [mean], [std]).to_hf()
        torch.manual_seed(0)
        save_model(tmp_path / f"{mean}", PretrainedClassifier(3, config=config), image_processor=own)
        made = student(tmp_path / f"{mean}", config, cache_top_k=2)
        trainer(tmp_path, max_steps=1).fit(made, datamodule=data)
        made.teacher.network.register_forward_pre_hook(lambda _, args, kwargs: shown.update(kwargs), with_kwargs=True)
        with made.teacher.asked() as network:
            network(pixel_values=pixels)
        torch.testing.assert_close(shown["pixel_values"], (pixels * 0.25 + 0.5 - mean) / std)
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 2
    save_model(
        tmp_path / "3",
        PretrainedClassifier(3, config=config),
        image_processor=ImageProcessor((3, 8, 8), [0.5] * 3, [0.5] * 3).to_hf(),
    )
    message = "data.channels must be those of the images that model.teacher reads, 3, but are 1; set data.channels to 3"
    with pytest.raises(ValueError, match=exactly(message)):
        trainer(tmp_path, max_steps=1).fit(student(tmp_path / "3", config), datamodule=data)


@pytest.mark.parametrize("options", [{"cache_top_k": 2}, {"hidden_weight": 1.0}])
def test_a_teacher_stays_in_32_bits_where_its_student_is_in_16(tmp_path, monkeypatch, options):
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "vit", PretrainedClassifier(3, config=VIT | {"image_size": 8, "num_channels": 1}))
    made = student(tmp_path / "vit", VIT | {"image_size": 8, "num_channels": 1, "num_hidden_layers": 1}, **options)
    seen = []
    made.on_fit_start = lambda: made.teacher.network.register_forward_hook(
        lambda network, args, said: seen.append((said.dtype, torch.get_default_dtype()))
    )
    trainer(tmp_path, precision="bf16-true").fit(made, datamodule=Images())
    assert seen == [(torch.float32, torch.float32)] * 3
    assert {p.dtype for p in made.teacher.network.parameters()} == {torch.float32}
    assert {p.dtype for p in made.network.parameters()} == {torch.bfloat16}


def test_a_teacher_of_another_task_other_classes_or_another_tokeniser_is_refused(bert, llama, tmp_path, lit_llm, tiny):
    def refused(made: Any, data: Examples) -> str:
        with pytest.raises(ValueError, match="must") as error:
            trainer(tmp_path).fit(made, datamodule=data)
        return str(error.value)

    assert refused(student(llama), Examples()) == (
        f"model.teacher must be sized by num_classes, but {llama} is a Llama, sized by vocab_size"
    )
    assert refused(student(bert), Examples(num_classes=2)) == (
        f"model.teacher must have the student's num_classes, 2, but {bert} has 3"
    )
    other = Examples()
    other.class_names = ["cat", "dog", "bird"]
    assert refused(student(bert), other) == (
        f"model.teacher must tell apart the student's classes, cat, dog, bird, but {bert} tells apart class 0, class 1, "
        f"class 2"
    )
    words = ["--model", "lit_llm.objectives.distillation.CausalLMDistillation", "--model.teacher", llama]
    outcome = lit_llm("fit", *tiny, *words, "--data.tokenizer", "bpe-270", "--run_dir", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.last_line == (
        f"lit-llm: error: data.tokenizer must be the one that model.teacher was trained with, but is another than that "
        f"of {llama}; set data.tokenizer to {llama}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", [["--model.hidden_weight", "1"], ["--model.cache_top_k", "8"]])
def test_a_run_that_is_cut_goes_on_bit_for_bit(way, llama, tmp_path, lit_llm, tiny):
    kind = ["--model", "lit_llm.objectives.distillation.CausalLMDistillation", "--model.teacher", llama, *way]
    words = ["fit", *tiny, *kind, "--checkpoint.every_n_steps", 3, "--test_after_fit", "false"]
    assert lit_llm(*words, "--run_dir", tmp_path / "whole").code == 0
    shutil.rmtree(cache_folder() / "teachers", ignore_errors=True)
    crash = '--trainer.callbacks+={"class_path": "tests.cli.test_resume.Crash", "init_args": {"step": 4}}'
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm(*words, "--run_dir", tmp_path / "cut", crash)
    assert lit_llm(*words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert states[0]["global_step"] == states[1]["global_step"] == 6
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
    outcome = lit_llm("test", "--run_dir", tmp_path / "cut")
    assert outcome.code == 0, outcome.err
    assert "test/bits_per_byte" in outcome.out
