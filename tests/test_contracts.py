"""Contracts of all networks, objectives, data modules and callbacks, which are found by walking the package."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import tempfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader
from torchmetrics import Metric

import lit_llm
from lit_llm.batch import IGNORE_INDEX, inputs
from lit_llm.blocks import Block
from lit_llm.checkpoints import save_model
from lit_llm.compression.calibration import answer
from lit_llm.compression.compression import Compression, replay
from lit_llm.compression.patterns import chosen_layers
from lit_llm.compression.quantization import FakeQuantized
from lit_llm.compression.sparsity import Magnitude, Movement, Zeros, add_masks
from lit_llm.compression.structured import Channels
from lit_llm.derivatives import differentiable_once
from lit_llm.generation import generate
from lit_llm.models.image_classifier import ImageClassifier
from lit_llm.objectives.distillation import Distillation
from lit_llm.objectives.objective import Objective
from lit_llm.objectives.semi_supervised import SemiSupervised
from lit_llm.optimizers import parameter_groups
from tests.examples import BERT, T5, example, partly_labelled, together, twenty_tokens


def classes(package: str, base: type) -> list[type]:
    module = importlib.import_module(package)
    found = {}
    for info in pkgutil.iter_modules(module.__path__, package + "."):
        for value in vars(importlib.import_module(info.name)).values():
            ours = inspect.isclass(value) and issubclass(value, base) and value.__module__ == info.name
            if ours and not inspect.isabstract(value):
                found[value.__qualname__] = value
    return list(found.values())


def everywhere(base: type) -> list[type]:
    """Subclasses in all modules, including private ones."""
    for info in pkgutil.walk_packages(lit_llm.__path__, "lit_llm."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    return [kind for kind in base.__subclasses__() if kind.__module__.startswith("lit_llm.")]


def first_argument(kind: type) -> str | None:
    return next(iter(inspect.signature(kind).parameters), None)


OF_IMAGES = classes("lit_llm.models", ImageClassifier)
OF_CLASSES = [c for c in classes("lit_llm.models", nn.Module) if first_argument(c) == "num_classes"]
CLASSIFIERS = [c for c in OF_CLASSES if c not in OF_IMAGES]
OF_TOKENS = [c for c in classes("lit_llm.models", nn.Module) if first_argument(c) == "vocab_size"]
LANGUAGE_MODELS = [c for c in OF_TOKENS if hasattr(c, "new_cache")]
ENCODERS = [c for c in OF_TOKENS if hasattr(c, "logits_at")]
ENCODER_DECODERS = [c for c in OF_TOKENS if hasattr(c, "generate")]
OBJECTIVES = classes("lit_llm.objectives", Objective)
COMPRESSIONS = classes("lit_llm.compression", Compression)
DATA_MODULES = classes("lit_llm.data", LightningDataModule)
CALLBACKS = classes("lit_llm.callbacks", Callback)
SMALL = {"d_model": 16, "num_layers": 2, "num_heads": 2}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "sliding_window": 4,
}
VOCAB = 20


def small(kind: type, tied: bool = False) -> dict[str, Any]:
    """Arguments for a network of two small layers."""
    known = SMALL | {"tie_embeddings": tied, "config": MISTRAL | {"tie_word_embeddings": tied}}
    return {name: value for name, value in known.items() if name in inspect.signature(kind).parameters}


def awake(network: nn.Module) -> nn.Module:
    """Makes all weights random, including those that are initialised to zero."""
    with torch.no_grad():
        for p in network.parameters():
            noise = torch.randn_like(p)
            p.copy_(p + 0.1 * noise if p.ndim == 1 else 0.4 * noise)
    return network


def loss_falls(network: nn.Module, loss: Callable[[], torch.Tensor], lr: float = 0.03) -> bool:
    """Whether training halves the loss of one repeated batch."""
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    losses = []
    for _ in range(40):
        losses.append(loss())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses[-1].item() < 0.5 * losses[0].item()


def filled(make: Callable[[], nn.Module]) -> nn.Module:
    """A network made on the meta device, filled with NaN, and then initialised."""
    with torch.device("meta"):
        network = make()
    network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    network.reset_parameters()
    return network


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
class TestLanguageModel:
    def test_no_future_token_changes_a_past_logit(self, kind):
        network = awake(kind(VOCAB, **small(kind))).eval()
        ids = torch.randint(VOCAB, (2, 12))
        changed = ids.clone()
        changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
        before, after = network(ids), network(changed)
        assert torch.equal(before[:, :7], after[:, :7])
        assert not torch.equal(before[:, 7:], after[:, 7:])

    def test_the_loss_falls_on_one_repeated_batch(self, kind):
        network, ids = kind(VOCAB, **small(kind)), torch.randint(VOCAB, (4, 13))
        assert loss_falls(
            network, lambda: nn.functional.cross_entropy(network(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        )

    def test_its_head_reads_what_is_hidden(self, kind):
        network, ids = awake(kind(VOCAB, **small(kind))).eval(), torch.randint(VOCAB, (2, 5))
        assert type(network.lm_head) is nn.Linear
        assert torch.equal(network(ids), network.lm_head(network.hidden(ids)))

    def test_documents_packed_into_a_row_are_read_as_if_each_were_alone(self, kind):
        network, ids = awake(kind(VOCAB, **small(kind))).eval(), torch.randint(VOCAB, (2, 12))
        documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] + [1] * 11])
        positions = torch.tensor([[*range(5), *range(4), *range(3)], [0, *range(11)]])
        packed = network(ids, document_ids=documents, positions=positions)
        for row in range(2):
            for number in documents[row].unique():
                here = documents[row] == number
                alone = network(ids[row, here][None])[0]
                torch.testing.assert_close(packed[row, here], alone, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(packed[:, 5:], network(ids)[:, 5:], atol=1e-2)

    def test_prompts_of_different_length_continue_together_as_alone_and_as_without_a_cache(self, kind):
        network = awake(kind(VOCAB, **small(kind))).eval()
        prompts, alone = [[5], [3, 14, 15, 9, 2, 6], [1, 2, 3]], []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(network(torch.tensor([ids]))[0, -1].argmax()))
            alone.append(ids[len(prompt) :])
        assert generate(network, prompts, 6, temperature=0.0) == alone
        assert [generate(network, [prompt], 6, temperature=0.0)[0] for prompt in prompts] == alone
        assert len({tuple(text) for text in alone}) == 3

    def test_reading_with_a_cache_step_by_step_is_reading_at_once(self, kind):
        network, ids = awake(kind(VOCAB, **small(kind))).eval(), torch.randint(VOCAB, (2, 12))
        cache = network.new_cache(2, 12)
        with torch.no_grad():
            pieces = [network(piece, cache=cache) for piece in ids.split((5, 1, 1, 4, 1), dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), network(ids), atol=1e-5, rtol=1e-5)

    def test_the_state_dict_round_trips(self, kind):
        network, other = awake(kind(VOCAB, **small(kind))), kind(VOCAB, **small(kind))
        other.load_state_dict(network.state_dict())
        ids = torch.randint(VOCAB, (1, 5))
        assert torch.equal(network(ids), other(ids))

    def test_its_layers_are_blocks(self, kind):
        assert sum(isinstance(m, Block) for m in kind(VOCAB, **small(kind)).modules()) == 2

    def test_only_what_is_in_its_blocks_counts_as_their_matrices(self, kind):
        network = kind(VOCAB, **small(kind))
        roles = {group["role"]: group["params"] for group in parameter_groups(network)}
        inside = {p for m in network.modules() if isinstance(m, Block) for p in m.parameters() if p.ndim > 1}
        assert set(roles["matrices"]) == inside
        assert {*roles["embeddings"], *roles["head"]}.isdisjoint(inside)

    @pytest.mark.parametrize("tied", [False, True])
    def test_it_is_built_on_the_meta_device_and_then_filled(self, kind, tied):
        network = filled(lambda: kind(VOCAB, **small(kind, tied)))
        assert network(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()
        embedding = next(m for m in network.modules() if isinstance(m, nn.Embedding))
        assert (network.lm_head.weight is embedding.weight) == tied


@pytest.mark.parametrize("kind", ENCODERS)
class TestEncoder:
    def test_every_logit_depends_on_what_comes_before_and_after(self, kind):
        network, ids = awake(kind(VOCAB, config=BERT)).eval(), torch.randint(VOCAB, (1, 9))
        for place in (0, 8):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % VOCAB
            assert (network(ids) != network(changed)).any(dim=-1).all()

    def test_the_loss_falls_on_one_repeated_batch(self, kind):
        network, ids = kind(VOCAB, config=BERT), torch.randint(1, VOCAB, (4, 12))
        hidden = torch.rand(ids.shape) < 0.3
        masked = ids.masked_fill(hidden, 0)
        assert loss_falls(network, lambda: nn.functional.cross_entropy(network.logits_at(hidden, masked), ids[hidden]))

    def test_what_a_checkpoint_keeps_of_it_makes_it_again(self, kind):
        network = awake(kind(VOCAB, config=BERT)).eval()
        again = kind(VOCAB, **json.loads(json.dumps(network.arguments))).eval()
        again.load_state_dict(network.state_dict())
        ids = torch.randint(VOCAB, (1, 5))
        assert torch.equal(network(ids), again(ids))
        assert again.to_hf_config() == network.to_hf_config()

    def test_its_layers_are_blocks(self, kind):
        assert sum(isinstance(m, Block) for m in kind(VOCAB, config=BERT).modules()) == 2

    def test_it_is_built_on_the_meta_device_and_then_filled(self, kind):
        network = filled(lambda: kind(VOCAB, config=BERT))
        assert all(tensor.isfinite().all() for tensor in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
class TestEncoderDecoder:
    def test_it_learns_to_write_what_it_reads(self, kind):
        network, ids = kind(VOCAB, config=T5), torch.randint(2, VOCAB, (4, 6))
        assert loss_falls(network, lambda: nn.functional.cross_entropy(network(ids, ids).flatten(0, 1), ids.flatten()))

    def test_what_a_checkpoint_keeps_of_it_makes_it_again(self, kind):
        network, ids = awake(kind(VOCAB, config=T5)).eval(), torch.randint(2, VOCAB, (2, 6))
        again = kind(VOCAB, **json.loads(json.dumps(network.arguments))).eval()
        again.load_state_dict(network.state_dict())
        assert torch.equal(network(ids, ids), again(ids, ids))
        assert again.to_hf_config() == network.to_hf_config()

    def test_it_is_built_on_the_meta_device_and_then_filled(self, kind):
        network = filled(lambda: kind(VOCAB, config=T5))
        assert all(tensor.isfinite().all() for tensor in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize("kind", CLASSIFIERS)
class TestClassifier:
    def test_the_loss_falls_on_one_repeated_batch(self, kind):
        network, batch = kind(3, config=BERT), together([example(row, 3) for row in range(6)])
        assert loss_falls(
            network, lambda: nn.functional.cross_entropy(network(**inputs(batch)), batch["labels"]), lr=0.01
        )

    def test_the_state_dict_round_trips(self, kind):
        network, other, batch = awake(kind(3, config=BERT)).eval(), kind(3, config=BERT).eval(), inputs(example(0, 3))
        other.load_state_dict(network.state_dict())
        assert torch.equal(network(**batch), other(**batch))

    def test_what_a_checkpoint_keeps_of_it_makes_it_again(self, kind):
        network = kind(3, config=BERT)
        again = kind(3, **json.loads(json.dumps(network.arguments)))
        assert again.to_hf_config() == network.to_hf_config()

    def test_its_layers_are_blocks(self, kind):
        assert sum(isinstance(m, Block) for m in kind(3, config=BERT).modules()) == 2

    def test_it_is_built_on_the_meta_device_and_then_filled(self, kind):
        network = filled(lambda: kind(3, config=BERT))
        assert all(tensor.isfinite().all() for tensor in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize("kind", OF_IMAGES)
class TestImageClassifier:
    def test_the_loss_falls_on_one_repeated_batch(self, kind):
        network, images, labels = kind(3), torch.randn(6, 1, 28, 28), torch.tensor([0, 1, 2, 0, 1, 2])
        assert loss_falls(network, lambda: nn.functional.cross_entropy(network(pixel_values=images), labels), lr=0.003)

    def test_what_a_checkpoint_keeps_of_it_makes_it_again(self, kind):
        network = kind(3, 2, [9, 12], ["a", "b", "c"])
        again = kind(3, **json.loads(json.dumps(network.arguments)))
        assert again.to_hf_config() == network.to_hf_config()
        assert kind.hf_arguments(network.to_hf_config()) == {"num_classes": 3, **network.arguments}
        again.load_state_dict(network.state_dict())
        images = torch.randn(2, 2, 9, 12)
        assert torch.equal(network.eval()(images), again.eval()(images))

    def test_its_directory_is_known_by_its_name(self, kind):
        assert kind.hf_architectures == (kind.__name__,)

    def test_it_is_built_on_the_meta_device_and_then_filled(self, kind):
        network = filled(lambda: kind(3))
        assert network(torch.zeros(1, 1, 28, 28)).isfinite().all()


def rows(lengths: list[int], kind: type | None = None, width: int = 10) -> list[dict[str, torch.Tensor]]:
    """Batches of one row each: tokens of which only the first labels count, or examples for other objectives."""
    if kind is not None and issubclass(kind, SemiSupervised):
        return [partly_labelled(length, 3) for length in lengths]
    if kind is not None and kind.size_name != "vocab_size":
        return [example(length, 3 if kind.size_name == "num_classes" else None) for length in lengths]
    generator = torch.Generator().manual_seed(0)
    batches = []
    for row, length in enumerate(lengths):
        ids = torch.randint(VOCAB, (1, width + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, length:] = IGNORE_INDEX
        batch = {"input_ids": ids[:, :-1], "labels": labels}
        if hasattr(kind, "write"):  # a source and a target
            batch |= {"attention_mask": torch.ones_like(labels), "rows": torch.tensor([row])}
        batches.append(batch)
    return batches


def loader(batches: list) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def gradients(made: Objective) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in made.network.named_parameters() if p.grad is not None}


def states(made: Objective) -> list[torch.dtype]:
    """Data types of the states of all its metrics, including nested ones."""
    metrics = [module for module in made.modules() if isinstance(module, Metric)]
    return [getattr(m, name).dtype for m in metrics for name in m._defaults if torch.is_tensor(getattr(m, name))]


@functools.cache
def teacher_of(kind: type) -> str:
    """The model directory of a teacher with three layers."""
    folder = Path(tempfile.mkdtemp(prefix="teacher-")) / "model"
    deep = {"config": BERT | {"num_hidden_layers": 3}}
    if hasattr(kind, "read_tokens_of"):
        network = ENCODERS[0](VOCAB, **deep)
    else:
        of_classes = kind.size_name == "num_classes"
        network = CLASSIFIERS[0](3, **deep) if of_classes else LANGUAGE_MODELS[0](VOCAB, **SMALL | {"num_layers": 3})
    save_model(folder, awake(network))
    return str(folder)


def learning(kind: type) -> dict[str, Any]:
    """Required arguments of an objective."""
    return {"teacher": teacher_of(kind), "hidden_weight": 0.5} if issubclass(kind, Distillation) else {}


def objective(kind: type) -> Objective:
    given = learning(kind)
    torch.manual_seed(0)
    if hasattr(kind, "read_tokens_of") or hasattr(kind, "texts"):
        hides = {"mask_ratio": 0.5} if hasattr(kind, "read_tokens_of") else {}
        network, config = (ENCODER_DECODERS[0], T5) if hasattr(kind, "texts") else (ENCODERS[0], BERT)
        made = kind(functools.partial(network, config=config), vocab_size=VOCAB, **hides, **given)
        if hides:
            made.read_tokens_of(twenty_tokens())
    elif kind.size_name == "vocab_size":
        made = kind(functools.partial(LANGUAGE_MODELS[0], **SMALL), vocab_size=VOCAB, **given)
    else:
        size = {"num_classes": 3} if kind.size_name == "num_classes" else {}
        made = kind(functools.partial(CLASSIFIERS[0], config=BERT), **size, **given)
    made.configure_model()
    awake(made.network)
    made.optimizer_zero_grad = lambda *args: None  # keeps the gradients for the tests
    return made


def trainer(tmp_path, **options) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        max_steps=1,
        max_epochs=-1,
        **options,
    )


@pytest.mark.parametrize("kind", OBJECTIVES)
class TestObjective:
    def test_eight_batches_of_one_give_the_gradient_of_one_batch_of_eight(self, kind, tmp_path):
        single = rows([1, 9, 3, 10, 2, 7, 5, 4], kind)
        eight, one = objective(kind), objective(kind)
        trainer(tmp_path, accumulate_grad_batches=8).fit(eight, loader(single))
        trainer(tmp_path).fit(one, loader([together(single)]))
        assert gradients(one)
        for name, gradient in gradients(one).items():
            torch.testing.assert_close(gradients(eight)[name], gradient, rtol=1e-4, atol=1e-6)

    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self, kind, tmp_path):
        made = objective(kind)
        frozen = next(name for name, _ in made.network.named_parameters())
        made.network.get_parameter(frozen).requires_grad_(False)
        trainer(tmp_path).fit(made, loader(rows([10], kind)))
        reached = gradients(made)
        assert set(reached) == {name for name, p in made.network.named_parameters()} - {frozen}
        assert all(gradient.abs().sum() > 0 for gradient in reached.values())

    def test_a_checkpoint_rebuilds_the_objective_without_executing_anything(self, kind, tmp_path):
        from lit_llm.checkpoint_files import read_checkpoint

        made = objective(kind)
        run = trainer(tmp_path)
        run.fit(made, loader(rows([10], kind)))
        run.save_checkpoint(tmp_path / "x.ckpt")
        read_checkpoint(tmp_path / "x.ckpt")
        again = kind.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
        for name, p in made.network.state_dict().items():
            assert torch.equal(p, again.network.state_dict()[name])
        network = again.hparams.pop("network")
        assert network.get("class_path") == made.hparams["network"].get("class_path")
        assert again.hparams == {name: value for name, value in made.hparams.items() if name != "network"}

    def test_its_metrics_keep_their_digits_where_it_is_in_16_bits(self, kind):
        for low in (torch.bfloat16, torch.float16):
            made = objective(kind).to(low)
            assert next(made.network.parameters()).dtype == low
            before = states(objective(kind))
            assert states(made) == before
            for metric in (made.val_metric, made.test_metric):
                metric.reset()
            assert states(made) == before

    def test_a_function_that_no_checkpoint_could_rebuild_is_refused(self, kind):
        with pytest.raises(TypeError, match=r"^network must be a class or a functools.partial of one, so that a "):
            kind(lambda size: LANGUAGE_MODELS[0](size, **SMALL), **learning(kind))


def of_tokens(kind: type) -> bool:
    """Whether a data module gives rows for language models; others give examples with a label."""
    return "seq_len" in inspect.signature(kind).parameters


def of_images(kind: type) -> bool:
    """Whether a data module gives images."""
    return "image" in inspect.signature(kind).parameters


@pytest.fixture
def data(kind, corpus, chats, reviews, pictures) -> Callable[[], LightningDataModule]:
    """Makes a data module on its kind of data: texts, conversations, labelled texts or labelled images."""
    asked = inspect.signature(kind).parameters
    of_chats = "messages" in asked or "target" in asked  # prompts are sources, responses are targets
    path = chats if of_chats else corpus if of_tokens(kind) else pictures if of_images(kind) else reviews
    own = {"seq_len": 128} if of_tokens(kind) else {}
    own |= {} if of_images(kind) else {"tokenizer": "t5-bpe-400" if "target" in asked else "bytes"}

    def make() -> LightningDataModule:
        made = kind(path=str(path), batch_size=3, validation_fraction=0.2, **own)
        made.prepare_data()
        made.setup("fit")
        return made

    return make


def of_labels(kind: type) -> bool:
    """Whether a data module gives examples with a label."""
    return "label" in inspect.signature(kind).parameters


@pytest.mark.parametrize("kind", [kind for kind in DATA_MODULES if "target" in inspect.signature(kind).parameters])
class TestPairData:
    def test_batches_have_the_fields_of_the_contract(self, kind, data):
        made = data()
        for batch in (next(iter(made.train_dataloader())), next(iter(made.val_dataloader()))):
            assert set(batch) == set(lit_llm.batch.Seq2SeqBatch.__annotations__)
            assert {len(tensor) for tensor in batch.values()} == {3}
            assert {tensor.dtype for tensor in batch.values()} == {torch.long}
            assert batch["input_ids"].shape == batch["attention_mask"].shape

    def test_the_facts_that_others_ask_for_are_there(self, kind, data):
        made = data()
        assert made.vocab_size == len(made.tokenizer)
        batch = next(iter(made.predict_dataloader()))
        assert len(made.texts(made.predict_split, batch["rows"].tolist())) == 3
        json.dumps(made.manifest)
        data().load_state_dict(made.state_dict())


@pytest.mark.parametrize("kind", [kind for kind in DATA_MODULES if of_labels(kind)])
class TestExampleData:
    def test_batches_have_the_fields_of_the_contract(self, kind, data):
        made = data()
        for batch in (next(iter(made.train_dataloader())), next(iter(made.val_dataloader()))):
            contract = lit_llm.batch.ImageBatch if of_images(kind) else lit_llm.batch.ExampleBatch
            assert set(batch) <= set(contract.__annotations__)
            assert {"labels", "rows"} == set(batch) - set(lit_llm.batch.inputs(batch))
            assert len(batch["labels"]) == len(batch["rows"]) == 3
            assert batch["labels"].dtype == batch["rows"].dtype == torch.long

    def test_the_facts_that_others_ask_for_are_there(self, kind, data):
        made = data()
        assert made.num_classes == len(made.class_names) == len(made.class_counts) == 2
        assert made.num_targets is None
        assert made.label_name(1) == made.class_names[1]
        assert sum(made.class_counts) == made.manifest["splits"]["train"]["examples"]
        batch = next(iter(made.predict_dataloader()))
        assert len(made.texts(made.predict_split, batch["rows"].tolist())) == 3
        json.dumps(made.manifest)
        data().load_state_dict(made.state_dict())


@pytest.mark.parametrize("kind", [kind for kind in DATA_MODULES if of_tokens(kind)])
class TestTokenData:
    def test_batches_have_the_fields_of_the_contract(self, kind, data):
        batch = next(iter(data().train_dataloader()))
        assert set(batch) <= set(lit_llm.batch.TokenBatch.__annotations__)
        ids, labels = batch["input_ids"], batch["labels"]
        assert ids.shape == labels.shape == (3, 128)
        assert ids.dtype == labels.dtype == torch.long
        documents = batch.get("document_ids", torch.zeros_like(ids))
        inside = (labels[:, :-1] != IGNORE_INDEX) & (documents[:, :-1] == documents[:, 1:])
        assert inside.any()
        assert torch.equal(ids[:, 1:][inside], labels[:, :-1][inside])

    def test_the_facts_that_others_ask_for_are_there(self, kind, data):
        made = data()
        assert (made.vocab_size, made.seq_len) == (257, 128)
        assert json.loads(json.dumps(made.manifest))["splits"]["train"]["documents"] > 0
        data().load_state_dict(made.state_dict())


@pytest.mark.parametrize("kind", [kind for kind in DATA_MODULES if of_images(kind)])
class TestImageData:
    def test_the_facts_that_others_ask_for_are_there(self, kind, data):
        made = data()
        batch = next(iter(made.train_dataloader()))
        rows = batch["rows"].tolist()
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["pixel_values"].shape == (3, *made.image_shape)
        mean, std = (torch.tensor(made.normalization[name])[:, None, None] for name in ("mean", "std"))
        torch.testing.assert_close(batch["pixel_values"] * std + mean, made.images("train", rows) / 255)
        named = [line["image"] for line in made.texts("train", rows)]
        assert len(set(named)) == len(rows)
        assert json.loads(json.dumps(made.image_processor)) == made.image_processor


def same(first: list[dict], second: list[dict]) -> bool:
    """Whether the inputs of two lists of batches are equal."""
    pairs = ((inputs(a), inputs(b)) for a, b in zip(first, second, strict=True))
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a | b)


@pytest.mark.parametrize("kind", DATA_MODULES)
class TestDataModule:
    def test_the_same_seed_gives_the_same_order(self, kind, data):
        first, second = (list(data().train_dataloader()) for _ in range(2))
        assert same(first, second)

    def test_it_goes_on_where_it_stopped(self, kind, data):
        whole = list(data().train_dataloader())
        loader = data().train_dataloader()
        reading = iter(loader)
        for _ in range(2):
            next(reading)
        fresh = data().train_dataloader()
        fresh.load_state_dict(loader.state_dict())
        rest = list(fresh)
        assert len(rest) == len(whole) - 2 > 0
        assert same(whole[2:], rest)


def decoder() -> nn.Module:
    """A language model with the argument `d_head`."""
    kind = next(kind for kind in LANGUAGE_MODELS if "d_head" in inspect.signature(kind).parameters)
    return kind(VOCAB, **SMALL)


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))


def made_small(kind: type) -> Compression:
    """A method with arguments that suit small layers."""
    small = {"group_size": 8}
    if issubclass(kind, FakeQuantized):
        return kind(init_args=small)
    return kind(**{name: value for name, value in small.items() if name in inspect.signature(kind).parameters})


@pytest.mark.parametrize("kind", COMPRESSIONS)
class TestCompression:
    def pair(self, kind: type) -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
        """Two equal networks, the first to be compressed, and a batch; it is pruned for methods that need zeros."""
        made = [awake(Convolutions() if issubclass(kind, Channels) else decoder()) for _ in "ab"]
        made[1].load_state_dict(made[0].state_dict())
        if issubclass(kind, Movement | Zeros):
            Magnitude().apply(made[0])
        if issubclass(kind, Movement):
            for network in made:
                add_masks(network, list(chosen_layers(network)), scores=True)
        ids = torch.randint(VOCAB, (4, 6))
        return *made, {"input": torch.randn(4, 1, 8, 8), "input_ids": ids, "labels": ids[:, 0] % 3}

    def test_its_record_and_the_weights_make_the_network_again(self, kind):
        network, fresh, batch = self.pair(kind)
        before = {name: p.clone() for name, p in network.state_dict().items()}
        made_small(kind).apply(network, [batch])
        after = network.state_dict()
        assert any(name not in after or not torch.equal(after[name], p) for name, p in before.items()) or len(
            after
        ) > len(before)
        records = json.loads(json.dumps(network.compression))
        if hasattr(network, "to_hf_config"):
            fresh = type(network).from_hf_config(network.to_hf_config())
        if issubclass(kind, Movement):
            add_masks(fresh, list(chosen_layers(fresh)), scores=True)
        replay(fresh, records).load_state_dict(after)
        assert torch.equal(answer(fresh.eval(), batch), answer(network.eval(), batch))
        assert fresh.compression == records

    def test_it_leaves_mode_and_random_numbers_as_they_were(self, kind):
        for mode in (True, False):
            network, _, batch = self.pair(kind)
            network.train(mode)
            state = torch.get_rng_state()
            made_small(kind).apply(network, [batch])
            assert all(module.training == mode for module in network.modules())
            assert torch.equal(torch.get_rng_state(), state)


# (The state of a BestCheckpoint is only valid with its file: tests/cli/test_resume.py.)
@pytest.mark.parametrize("kind", [kind for kind in CALLBACKS if not issubclass(kind, ModelCheckpoint)])
def test_a_callbacks_state_survives_saving_and_loading(kind):
    known = {"prompts": ["x"], "max_parameters": 9}
    needed = {name: value for name, value in known.items() if name in inspect.signature(kind).parameters}
    first, second = kind(**needed), kind(**needed)
    if type(first).state_dict is Callback.state_dict:
        assert type(first).load_state_dict is Callback.load_state_dict
        return
    plain = [key for key in first.state_dict() if not isinstance(getattr(first, key), Enum)]
    for number, key in enumerate(plain):
        old, new = getattr(first, key), number + 7
        setattr(
            first,
            key,
            {"metric": 1.0} if isinstance(old, dict) else old + new if isinstance(old, torch.Tensor) else new,
        )
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()


TWICE = {"_CPURotate": lambda: (draw(1, 2, 3, 4), *(torch.randn(1, 1, 3, 2, dtype=torch.double) for _ in "cs"))}
"""Arguments for the custom autograd functions that can be differentiated twice."""


REFUSING = (differentiable_once, once_differentiable)
"""torch's own is sufficient if the backward pass reads only the gradient."""


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("kind", everywhere(torch.autograd.Function), ids=lambda kind: kind.__name__)
def test_a_second_derivative_is_right_or_refused(kind):
    refuses = any(f"@{once.__name__}\n" in inspect.getsource(kind.backward) for once in REFUSING)
    assert refuses != (kind.__name__ in TWICE)
    assert refuses or torch.autograd.gradgradcheck(kind.apply, TWICE[kind.__name__]())
