"""Which depths learn, from which step and at what rate, is determined by depth and step."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification

from lit_llm.adaptation import Adaptation, DoRA, FrozenLayers, GradualUnfreezing, HeadOnly, LayerDecay, LoRA, RSLoRA
from lit_llm.blocks import Block, depths
from lit_llm.checkpoints import load_model, read_adapted, save_model
from lit_llm.data.sampling import BatchLoader
from lit_llm.models.gpt2 import GPT2
from lit_llm.models.llama import Llama
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_masked_lm import PretrainedMaskedLM
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.regression import Regression
from lit_llm.optimizers import parameter_groups
from tests.examples import BERT, Examples, example, together
from tests.writing import exactly

NETWORK = functools.partial(PretrainedClassifier, config=BERT)
XLM_R = BERT | {"model_type": "xlm-roberta", "pad_token_id": 0}  # its head is constructed before the backbone
ADAPTERS = [LoRA, DoRA, RSLoRA]
TOP = 3  # two blocks
STEPS = 12


class Ordered(Examples):
    """Uses the package's loader, in order or shuffled, which resumes where it stopped."""

    augmentation = None

    def train_dataloader(self) -> BatchLoader:
        return self.ordered_dataloader("train", 8, 0)

    def ordered_dataloader(
        self, split: str, batch_size: int = 5, seed: int | None = None, share: bool = True
    ) -> BatchLoader | list[Any]:
        def cut(rows: np.ndarray) -> dict[str, torch.Tensor]:
            return together([example(int(row), self.num_classes) for row in rows])

        return BatchLoader(cut, 24, batch_size, seed) if split == "train" else []


class Watch(Callback):
    """Records at each step which depths had a gradient, which moved, and their learning rates."""

    def __init__(self) -> None:
        self.reached: list[set[int]] = []
        self.moved: list[set[int]] = []
        self.rates: list[dict[int, float]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: p.detach().clone() for name, p in pl_module.network.named_parameters()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found, _ = depths(pl_module.network)
        self.reached.append({found[p] for p in pl_module.network.parameters() if p.grad is not None})
        rates = {found[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.rates.append(rates)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        found, _ = depths(pl_module.network)
        now = pl_module.network.named_parameters()
        self.moved.append({found[p] for name, p in now if not torch.equal(p, self.before[name])})
        self.losses.append(outputs["loss"].item())


def trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    shown = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"max_steps": STEPS, "max_epochs": -1, "num_sanity_val_steps": 0} | shown | options
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **options)


def objective(adaptation: Adaptation | None, network: Any = NETWORK) -> Classification:
    torch.manual_seed(0)
    return Classification(network, functools.partial(torch.optim.AdamW, lr=0.01), adaptation=adaptation)


def watched(tmp_path: Path, adaptation: Adaptation, **options: Any) -> Watch:
    watch = Watch()
    trainer(tmp_path, watch, **options).fit(objective(adaptation), datamodule=Ordered())
    return watch


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Llama, GPT2])
def test_depths_rise_from_the_embeddings_to_the_head(kind: type, tied: bool) -> None:
    network = kind(20, d_model=16, num_layers=2, num_heads=2, tie_embeddings=tied)
    found, top = depths(network)
    assert top == TOP
    by_depth = [{name.split(".")[0] for name, p in network.named_parameters() if found[p] == d} for d in range(TOP + 1)]
    embeddings, blocks, norm = ({"wte", "wpe"}, "h", "ln_f") if kind is GPT2 else ({"embed_tokens"}, "layers", "norm")
    assert by_depth == [embeddings, {blocks}, {blocks, norm}, set() if tied else {"lm_head"}]


@pytest.mark.parametrize("adaptation", [LayerDecay(), FrozenLayers(0), GradualUnfreezing(), LoRA(2)])
def test_a_table_of_positions_that_comes_frozen_stays_so(adaptation: Adaptation) -> None:
    network = PretrainedClassifier(3, config=BERT | {"model_type": "roformer", "embedding_size": BERT["hidden_size"]})
    frozen = [p for p in network.parameters() if not p.requires_grad]
    assert frozen
    adaptation.prepare(network)
    assert not any(p.requires_grad for p in frozen)


SMALL = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["bert", "nomic_bert"])
def test_a_pooler_belongs_to_the_head_wherever_it_was_made(kind: str) -> None:
    network = PretrainedClassifier(3, config=SMALL | {"model_type": kind})
    found, top = depths(network)
    head = {name.rpartition(".")[0] for name, p in network.named_parameters() if found[p] == top}
    assert head == {"model.classifier", f"model.{kind}.pooler.dense"}


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
def test_what_is_outside_the_backbone_is_the_head_wherever_it_was_made(kind: str) -> None:
    network = PretrainedClassifier(3, config=SMALL | {"model_type": kind})
    found, top = depths(network)
    by_depth = {
        depth: {n.split(".")[2] for n, p in network.named_parameters() if found[p] == depth} for depth in (0, top)
    }
    assert by_depth == {0: {"embeddings"}, top: {"dense", "out_proj"}}


def test_a_matrix_of_the_head_that_is_the_embeddings_too_is_at_the_bottom_wherever_it_was_made() -> None:
    network = PretrainedMaskedLM(20, config=SMALL | {"model_type": "xlm-roberta"})
    found, top = depths(network)
    model = network.model
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    assert {name: found[p] for name, p in model.lm_head.named_parameters()} == {
        "decoder.weight": 0,
        **dict.fromkeys(("bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias"), top),
    }


RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}


@pytest.mark.parametrize(
    "described",
    [
        SMALL | RELATIVE | {"model_type": "deberta-v2", "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
        SMALL | {"model_type": "mpnet"},
        {"model_type": "bart", "vocab_size": 20, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1},
    ],
    ids=lambda described: described["model_type"],
)
def test_nothing_that_frozen_blocks_read_is_trained_wherever_it_was_made(described: dict[str, Any]) -> None:
    network = PretrainedClassifier(3, config=described | {"pad_token_id": 0, "eos_token_id": 2})
    FrozenLayers(1).prepare(network)
    learns = []
    for block in [module for module in network.modules() if isinstance(module, Block)][:2]:
        block.register_forward_hook(lambda module, args, out: learns.append(torch.as_tensor(out[0]).requires_grad))
    network(input_ids=torch.tensor([[5, 6, 7, 2]]))
    assert learns == [False, True]


def test_what_starts_first_starts_at_once_where_the_head_is_tied_to_the_embeddings() -> None:
    network = GPT2(20, d_model=16, num_layers=2, num_heads=2)
    groups = GradualUnfreezing(until=0.5).groups(parameter_groups(network), network)
    starts = {found: group["start"] for group in groups for found in {depths(network)[0][p] for p in group["params"]}}
    assert starts == pytest.approx({2: 0, 1: 1 / 6, 0: 1 / 3})


@pytest.mark.parametrize("kind", [LayerDecay, GradualUnfreezing])
def test_each_layer_steps_slower_than_the_one_above_and_the_head_by_a_factor_of_its_own(kind: type) -> None:
    network = NETWORK(3)
    found, top = depths(network)
    groups = kind(decay=0.5, head_factor=10.0).groups(parameter_groups(network), network)
    rates = {found[p]: group["rate"] for group in groups for p in group["params"]}
    assert rates == pytest.approx({top: 10.0, 2: 0.5, 1: 0.25, 0: 0.125})


def test_features_are_forgotten_after_training(tmp_path: Path) -> None:
    made = objective(HeadOnly())
    trainer(tmp_path).fit(made, datamodule=Ordered())
    assert not made._features


@pytest.mark.parametrize(
    ("adaptation", "learning"),
    [
        (HeadOnly(cache_features=False), {3}),
        (HeadOnly(), {3}),
        (FrozenLayers(0), {1, 2, 3}),
        (FrozenLayers(1), {2, 3}),
        (FrozenLayers(2), {3}),
        (LayerDecay(0.5), {0, 1, 2, 3}),
    ],
)
def test_gradients_reach_exactly_the_depths_that_learn(tmp_path: Path, adaptation: Adaptation, learning: set) -> None:
    watch = watched(tmp_path, adaptation)
    assert watch.reached == watch.moved == [learning] * STEPS


@pytest.mark.parametrize("adaptation", [HeadOnly(), FrozenLayers(2)])
def test_a_network_without_a_head_of_its_own_cannot_learn_by_its_head_alone(adaptation: Adaptation) -> None:
    network = Llama(20, d_model=16, num_layers=2, num_heads=2, tie_embeddings=True)
    message = (
        f"adaptation must leave something to learn, but {type(adaptation).__name__} freezes all of a network that has "
        f"no head apart from its embeddings; take another, such as LoRA"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        adaptation.prepare(network)


@pytest.mark.parametrize("parts", [1, 3])
def test_layers_wake_from_the_head_down_and_cost_nothing_before(tmp_path: Path, parts: int) -> None:
    watch = watched(tmp_path, GradualUnfreezing(decay=0.5, until=0.6), accumulate_grad_batches=parts)
    first = {depth: math.ceil(0.6 * (TOP - depth) / TOP * STEPS) for depth in range(TOP + 1)}
    assert first == {3: 0, 2: 3, 1: 5, 0: 8}
    awake = [{depth for depth in first if step >= first[depth]} for step in range(STEPS)]
    assert watch.reached == awake
    if parts == 1:
        assert watch.moved == awake
    for step, rates in enumerate(watch.rates):
        assert rates == pytest.approx({d: 0.01 * 0.5 ** (TOP - d) if d in awake[step] else 0 for d in range(TOP + 1)})


@pytest.mark.parametrize("cut", [2, 3, 6, 8, 9])
def test_a_resumed_run_wakes_layers_as_one_never_stopped(tmp_path: Path, cut: int) -> None:
    adaptation = GradualUnfreezing(until=0.6)
    whole = watched(tmp_path, adaptation)
    first, second = Watch(), Watch()
    made = objective(adaptation)
    run = trainer(tmp_path, first)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == cut:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                trainer.should_stop = True

    run.callbacks.append(Stop())
    run.fit(made, datamodule=Ordered())
    again = objective(adaptation)
    trainer(tmp_path, second).fit(again, datamodule=Ordered(), ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    assert [*first.reached, *second.reached] == whole.reached
    assert [*first.moved, *second.moved] == whole.moved


def test_cached_features_train_as_those_made_at_each_step(tmp_path: Path) -> None:
    plain, cached = watched(tmp_path, HeadOnly(cache_features=False)), watched(tmp_path, HeadOnly())
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert plain.losses[-1] < plain.losses[0]


def test_a_cached_backbone_is_not_asked_again(tmp_path: Path) -> None:
    made, asked = objective(HeadOnly()), []

    class Count(Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.network.backbone.embeddings.register_forward_hook(lambda *args: asked.append(1))

    trainer(tmp_path, Count(), limit_val_batches=0).fit(made, datamodule=Ordered())
    # One batch to see what the head reads and twice to compare with `forward`, then all 24 rows in fives, once.
    assert len(asked) == 3 + 5


def test_a_head_that_reads_whole_sequences_has_its_backbone_read_at_each_step(tmp_path: Path, caplog) -> None:
    special = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    sizes = {name: BERT[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    modern = {"model_type": "modernbert", "intermediate_size": 32, "classifier_pooling": "mean", **sizes, **special}
    with caplog.at_level("INFO", logger="lit_llm"):
        network = functools.partial(PretrainedClassifier, config=modern)
        trainer(tmp_path, max_steps=1).fit(objective(HeadOnly(), network), datamodule=Ordered())
    assert "The head reads whole sequences" in caplog.text


def test_features_of_augmented_examples_are_not_cached(tmp_path: Path) -> None:
    data = Ordered()
    data.augmentation = object()
    message = "model.adaptation.cache_features must be false where training examples are augmented, but is true"
    with pytest.raises(ValueError, match=exactly(message)):
        trainer(tmp_path).fit(objective(HeadOnly()), datamodule=data)


@pytest.mark.parametrize("kind", ADAPTERS)
class TestAdapter:
    @pytest.mark.parametrize("described", [BERT, XLM_R], ids=lambda described: described["model_type"])
    def test_only_adapters_and_head_learn_and_training_starts_from_the_network_as_it_was(self, kind, described):
        network = PretrainedClassifier(3, config=described).eval()
        batch = example(3, 3)
        before = network(input_ids=batch["input_ids"])
        kind(rank=2).prepare(network)
        torch.testing.assert_close(network(input_ids=batch["input_ids"]), before)
        learning = {name for name, p in network.named_parameters() if p.requires_grad}
        assert all(any(part in name for part in ("lora_", ".classifier.", ".pooler.")) for name in learning)
        assert {"lora_A", "lora_B", "classifier"} <= {part for name in learning for part in name.split(".")}

    @pytest.mark.parametrize("described", [BERT, XLM_R], ids=lambda described: described["model_type"])
    def test_a_run_gives_merged_weights_and_adapters_that_peft_reads(self, kind, described, tmp_path):
        base = PretrainedClassifier(3, config=described)
        save_model(tmp_path / "base", base)
        network = functools.partial(PretrainedClassifier, path=str(tmp_path / "base"))
        made, watch = objective(kind(rank=2), network), Watch()
        run = trainer(tmp_path, watch)
        run.fit(made, datamodule=Examples())
        assert watch.losses[-1] < watch.losses[0]
        run.save_checkpoint(tmp_path / "x.ckpt")
        made.eval()
        ids = torch.cat([example(row, 3)["input_ids"] for row in range(9)])
        expected = made.network(input_ids=ids)
        merged, _ = load_model(tmp_path / "x.ckpt")
        assert sorted(merged.state_dict()) == sorted(base.state_dict())
        torch.testing.assert_close(merged(input_ids=ids), expected, atol=1e-5, rtol=1e-4)
        as_trained, adaptation = read_adapted(tmp_path / "x.ckpt")
        assert adaptation == kind(rank=2)
        adaptation.save(as_trained, tmp_path / "adapter")
        saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["modules_to_save"]
        assert any(name.startswith("classifier") for name in saved)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)

    def test_its_state_survives_a_stop(self, kind, tmp_path):
        made = objective(kind(rank=2))
        run = trainer(tmp_path, max_steps=4)
        run.fit(made, datamodule=Ordered())
        run.save_checkpoint(tmp_path / "x.ckpt")
        whole, cut = Watch(), Watch()
        trainer(tmp_path, whole).fit(objective(kind(rank=2)), datamodule=Ordered())
        again = objective(kind(rank=2))
        trainer(tmp_path, cut).fit(again, datamodule=Ordered(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
        assert cut.losses == whole.losses[4:]


def test_a_language_model_keeps_its_head_beside_adapters() -> None:
    network = Llama(20, d_model=16, num_layers=2, num_heads=2)
    LoRA(rank=2).prepare(network)
    assert all("lora_" in name for name, p in network.named_parameters() if p.requires_grad)


def test_adapters_of_an_own_decoder_have_the_names_that_transformers_gives_its_layers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    network = Llama(20, d_model=16, num_layers=2, num_heads=2)
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    save_model(tmp_path / "base", network)
    adaptation = LoRA(rank=2)
    adaptation.prepare(network)
    for p in network.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    (tmp_path / "adapter").mkdir()
    adaptation.save(network.eval(), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.randint(20, (2, 6))
    torch.testing.assert_close(theirs(input_ids=ids).logits, network(ids), atol=1e-4, rtol=1e-4)


def test_targets_are_chosen_by_name() -> None:
    network = NETWORK(3)
    LoRA(rank=2, targets=["query", "value"]).prepare(network)
    adapted = {name.rsplit(".", 1)[-1] for name, module in network.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"query", "value"}


def test_targets_that_are_none_are_refused_with_what_there_is() -> None:
    message = "targets must name layers with a matrix inside blocks (dense, key, query, value), but are ['q_proj']"
    with pytest.raises(ValueError, match=exactly(message)):
        LoRA(targets=["q_proj"]).prepare(NETWORK(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrozenLayers(-1), "num_layers must be at least 0, but is -1"),
        (lambda: LayerDecay(0.0), "decay must be in (0, 1], but is 0.0"),
        (lambda: LayerDecay(head_factor=0.0), "head_factor must be above 0, but is 0.0"),
        (lambda: GradualUnfreezing(until=1.0), "until must be in (0, 1), but is 1.0"),
        (lambda: LoRA(rank=0), "rank must be at least 1, but is 0"),
        (lambda: LoRA(dropout=1.0), "dropout must be in [0, 1), but is 1.0"),
        (
            lambda: FrozenLayers(3).prepare(NETWORK(3)),
            "num_layers must be at most the blocks of the network, 2, but is 3",
        ),
    ],
)
def test_a_value_out_of_range_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        make()


def test_a_regression_adapts_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, watch = Regression(NETWORK, functools.partial(torch.optim.AdamW, lr=0.01), adaptation=LoRA(rank=2)), Watch()
    trainer(tmp_path, watch).fit(made, datamodule=Examples(None))
    assert watch.losses[-1] < watch.losses[0]
