"""`lit-llm plan` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import BertConfig, BertModel

from lit_llm.checkpoints import save_model
from lit_llm.cli import trainer
from lit_llm.cli.plan_report import exchange
from lit_llm.data.tokenizer import byte_tokenizer
from lit_llm.models.lenet import LeNet
from lit_llm.models.pretrained_masked_lm import PretrainedMaskedLM
from lit_llm.models.pretrained_seq2seq import PretrainedSeq2Seq
from lit_llm.planning import STRATEGIES
from tests.examples import BERT
from tests.writing import REPOSITORY

MAIN = ["--config", REPOSITORY / "configs/pretraining/llama_stdlib.yaml"]
SMALL = ["--model.network.d_model", 16, "--model.network.num_layers", 1, "--model.network.num_heads", 2]
SMALL += ["--model.network.d_ff", 48]


@pytest.mark.slow
def test_a_plan_needs_neither_data_nor_tokeniser_and_writes_nothing(lit_llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--devices", 4, "--nodes", 2, "--memory", "24GiB", "--price", 2.5, "--table", "--json", "plan.json"]
    outcome = lit_llm("plan", *MAIN, *SMALL, "--data.path", "nowhere", *words)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    found = json.loads(Path("plan.json").read_text())
    assert found["devices"] == 8
    assert found["steps"]["as configured"]["embeddings"] == 2048 * 16
    assert set(found["memory"]) == {"as configured", "with activation checkpointing"}
    assert list(found["table"]) == ["8", "16", "32", "64", "128", "256", "512", "1024"]
    assert found["bill"] == pytest.approx({k: found["table"]["8"][k] for k in found["bill"]})
    assert found["bill"]["cost"] == pytest.approx(found["bill"]["kilowatt_hours"] / 0.7 * 2.5)
    for line in ("Memory of each of 8 devices, as configured; 24.00 GiB available", "Compute-optimal: ", "   1,024 "):
        assert line in outcome.out
    assert outcome.out.count("  fits") == 12
    assert found["memory"]["as configured"].keys() == set(STRATEGIES)


def test_characters_are_counted_in_the_texts_unless_their_number_is_given(lit_llm, tmp_path):
    told = " ".join(lit_llm("plan", "--help").out.split())
    assert "Only --data.tokenizer characters has to read them to count its tokens, unless --model.vocab_size" in told
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in "0123":
        (corpus / f"{number}.txt").write_text(f"abc {number}")
    words = [*MAIN, *SMALL, "--data.tokenizer", "characters", "--data.validation_fraction", 0]
    words += ["--data.test_fraction", 0, "--data.seq_len", 8, "--data.batch_size", 1, "--data.path"]
    assert step_of(lit_llm, tmp_path, *words, corpus)["embeddings"] == (len("abc 0123") + 2) * 16
    assert step_of(lit_llm, tmp_path, *words, "nowhere", "--model.vocab_size", 99)["embeddings"] == 99 * 16


def test_what_does_not_fit_is_said(lit_llm):
    outcome = lit_llm("plan", *MAIN, *SMALL, "--memory", "1MB")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("  does not fit") == 2


def test_a_probe_replaces_the_assumed_speed_and_leaves_no_run(lit_llm, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "multiplies_bfloat16", lambda kind: False)
    outcome = lit_llm("plan", *tiny, "--trainer.precision", "auto", "--probe", "--json", "plan.json")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir() if path.name != "corpus"] == ["plan.json"]
    found = json.loads(Path("plan.json").read_text())
    assert found["precision"] == "32-true"  # which auto is here
    probe, bill = found["probe"], found["bill"]
    assert probe["seconds_per_step"] == pytest.approx(4 * 32 / probe["tokens_per_second"])
    assert bill["seconds"] == pytest.approx(found["tokens"] / probe["tokens_per_second"])
    assert "measured here: " in outcome.out
    assert "run folder" not in outcome.out


def test_memory_of_a_classifier_is_that_of_its_longest_batch_and_time_that_of_its_mean_one(lit_llm, tmp_path):
    lines = [f"{'abc ' * (40 if n % 10 == 0 else 4)}{n},{('bad', 'good')[n % 2]}" for n in range(40)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *lines]))
    words = ["--config", REPOSITORY / "configs/finetuning/encoder_docmatch.yaml", "--data.path", tmp_path / "texts.csv"]
    words += ["--data.tokenizer", "bert-bpe-300", "--data.max_seq_len", 32, "--data.validation_fraction", 0]
    words += ["--data.batch_size", 4, "--trainer.max_epochs", 1]
    words += ["--model.network.config", json.dumps(BERT)]
    plans = []
    for seed in range(2):
        outcome = lit_llm("plan", *words, "--data.seed", seed, "--json", tmp_path / "plan.json")
        plans.append(json.loads((tmp_path / "plan.json").read_text()))
        assert (plans[-1]["batch_size"], plans[-1]["seq_len"]) == (4, 32)
    assert plans[0] == plans[1]  # four long texts share a batch, wherever it comes
    mean = plans[0]["tokens_per_batch"]
    assert 4 * 32 / 10 < mean < 4 * 16
    assert plans[0]["tokens"] == 10 * mean
    said = f"memory is that of the longest batch of an epoch, time that of their mean, {mean:,.1f} tokens with padding"
    assert said in outcome.out.splitlines()


def plan_of(lit_llm, tmp_path, *words):
    outcome = lit_llm("plan", *words, "--json", tmp_path / "plan.json")
    assert outcome.code == 0, outcome.err
    return json.loads((tmp_path / "plan.json").read_text())


def step_of(lit_llm, tmp_path, *words):
    return plan_of(lit_llm, tmp_path, *words)["steps"]["as configured"]


def test_tokens_per_parameter_are_a_rule_for_language_models_that_are_trained_from_scratch(lit_llm, tmp_path):
    lora = ["--config", REPOSITORY / "configs/adaptation/lora.yaml", "--model.adaptation.rank", 2]
    digits = ["--config", REPOSITORY / "configs/pretraining/cnn_digits.yaml"]
    steps = ["--data.batch_size", 4, "--data.seq_len", 32, "--devices", 2, "--trainer.accumulate_grad_batches", 3]
    endless = ["--trainer.max_steps", -1, "--trainer.max_time", "00:01:00:00"]
    for words, origin, tokens, said in (
        ([*MAIN, *SMALL], "rule", None, "Compute-optimal: "),
        (
            [*MAIN, *SMALL, *lora, *steps],
            "config",
            1000 * 768,
            "Planned for what the config trains on, 7.68e+05 tokens",
        ),
        (
            [*MAIN, *SMALL, *lora, *steps, *endless],
            "step",
            768,
            "Planned for a single step, 768 tokens; give --tokens for",
        ),
        ([*MAIN, *SMALL, *lora, "--tokens", 5e6], "option", 5e6, "Planned for --tokens, 5e+06 tokens\n"),
        (digits, "config", 10 * 20 * 64, "Planned for what the config trains on, 1.28e+04 examples"),
        ([*digits, "--trainer.max_steps", 3], "config", 3 * 64, "Planned for what the config trains on, 192 examples"),
        (
            [*digits, "--devices", 3, "--trainer.limit_train_batches", 5],
            "config",
            10 * 3 * 5 * 64,
            "Planned for what the config trains on, 9600 examples",
        ),
    ):
        outcome = lit_llm("plan", *words, "--json", tmp_path / "plan.json")
        assert outcome.code == 0, outcome.err
        found = json.loads((tmp_path / "plan.json").read_text())
        assert said in outcome.out
        assert ("Hoffmann" in outcome.out) is (found["optimal_tokens"] is not None) is (origin == "rule")
        assert found["tokens_from"] == origin
        assert tokens in (None, found["tokens"])


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_adapters_are_planned_as_they_are_trained(lit_llm, tmp_path, adapter):
    overlay = ["--config", REPOSITORY / f"configs/adaptation/{adapter}.yaml", "--model.adaptation.rank", 2]
    alone, adapted = (step_of(lit_llm, tmp_path, *MAIN, *SMALL, *words) for words in ([], overlay))
    matrices = [(16, 16)] * 4 + [(48, 16)] * 2 + [(16, 48)]
    trained = sum(2 * (rows + columns) + rows * (adapter == "dora") for rows, columns in matrices)
    assert adapted["parameters"] - alone["parameters"] == adapted["trained"] == trained
    assert adapted["gradients"] == 4 * trained


def test_operations_of_frozen_weights_are_planned_as_far_as_gradients_go(lit_llm, tmp_path):
    overlay = ["--config", REPOSITORY / "configs/adaptation/head_only.yaml"]
    found = plan_of(lit_llm, tmp_path, *MAIN, *SMALL, *overlay)
    step = found["steps"]["as configured"]
    assert found["flops_per_token"] == pytest.approx(step["flops"] / step["tokens"], rel=0.01)


def test_what_starts_from_weights_is_planned_without_reading_them(lit_llm, tmp_path, tiny_llama, reviews):
    save_model(tmp_path / "llama", tiny_llama(vocab_size=257), byte_tokenizer())
    words = ["--config", REPOSITORY / "configs/pretraining/llama_continued.yaml", "--data.tokenizer", "bytes"]
    words += ["--data.seq_len", 16, "--model.weights", tmp_path / "llama"]
    plan = plan_of(lit_llm, tmp_path, *words)
    planned = plan["steps"]["as configured"]
    assert planned["parameters"] == sum(p.numel() for p in tiny_llama(vocab_size=257).parameters())
    assert (plan["optimal_tokens"], plan["tokens_from"]) == (None, "config")  # fine-tuning: as long as the config says
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=400, **size), add_pooling_layer=False)
    encoder.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert/model.safetensors").write_bytes(b"nothing that could be read")
    words = ["--config", REPOSITORY / "configs/finetuning/encoder_glue.yaml", "--model.network.path", tmp_path / "bert"]
    words += ["--data.path", reviews, "--data.tokenizer", "bert-bpe-300", "--data.batch_size", 4]
    planned = step_of(lit_llm, tmp_path, *words)
    assert planned["parameters"] == sum(p.numel() for p in encoder.parameters()) + 2 * 16 + 2


def test_what_data_say_of_texts_and_images_sizes_what_is_planned(lit_llm, tmp_path, reviews):
    """The tokeniser's vocabulary and the images' size, and the weight average if the run keeps one."""
    finetuning, pretraining = REPOSITORY / "configs/finetuning", REPOSITORY / "configs/pretraining"
    words = ["--config", finetuning / "encoder_docmatch.yaml", "--data", "lit_llm.data.glue.GLUEData"]
    words += ["--data.path", reviews, "--data.tokenizer", "bert-bpe-300", "--data.batch_size", 4]
    found = plan_of(lit_llm, tmp_path, *words)
    assert found["steps"]["as configured"]["embeddings"] == 300 * 256
    plain, checkpointed = (found["steps"][name] for name in ("as configured", "with activation checkpointing"))
    assert checkpointed["activations"] < plain["activations"]
    planned = step_of(lit_llm, tmp_path, "--config", pretraining / "cnn_digits.yaml")
    assert planned["parameters"] == sum(p.numel() for p in LeNet(10, image_size=8, width=32).parameters())
    words = ["--config", pretraining / "cnn_mnist_fixmatch.yaml", "--data.path", "sklearn-digits"]
    words += ["--data.labels_per_class", 4, "--data.unlabelled_ratio", 3]
    assert step_of(lit_llm, tmp_path, *words)["average"] > 0


@pytest.mark.parametrize(
    ("config", "recipe", "kind", "size"),
    [
        ("modernbert_stdlib", "modernbert_mlm_4m", PretrainedMaskedLM, 8192),
        ("t5_stdlib", "t5_3m", PretrainedSeq2Seq, 4096),
    ],
)
def test_what_hides_words_is_planned_as_if_it_hid_as_many_as_on_average(lit_llm, tmp_path, config, recipe, kind, size):
    path = REPOSITORY / f"configs/pretraining/{config}.yaml"
    step = step_of(lit_llm, tmp_path, "--config", path)
    options = yaml.safe_load((REPOSITORY / f"configs/models/{recipe}.yaml").read_text())["init_args"]
    network = kind(size, **options)
    assert step["parameters"] == sum(p.numel() for p in network.parameters())
    more = step_of(lit_llm, tmp_path, "--config", path, "--model.mask_ratio", 0.5)
    assert more["parameters"] == step["parameters"]
    assert more["flops"] > 1.1 * step["flops"]


def test_a_loss_that_needs_more_than_shapes_is_said_to(lit_llm, monkeypatch):
    monkeypatch.setattr("lit_llm.objectives.causal_lm.CausalLM.planned_loss", lambda self, batch: self.trainer)
    assert lit_llm("plan", *MAIN, *SMALL).last_line == (
        "lit-llm: error: model must have a loss that needs shapes alone to be planned, but is a CausalLM; measure it with "
        "--probe"
    )


def test_where_shapes_do_not_tell_a_probe_is_all_there_is(lit_llm, tiny, tmp_path):
    lstm = ["--model.network", "lit_llm.models.recurrent.LSTM", "--model.network.d_model", 16, "--data.mask_documents"]
    refused = lit_llm("plan", *tiny, *lstm, "true")
    assert refused.last_line.endswith("; measure it with --probe")
    outcome = lit_llm("plan", *tiny, *lstm, "true", "--probe", 2, "--json", tmp_path / "plan.json")
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip().endswith("; no more can be planned, since shapes alone do not tell what a step takes")
    probe = json.loads((tmp_path / "plan.json").read_text())["probe"]
    assert probe["seconds_per_step"] == pytest.approx(4 * 32 / probe["tokens_per_second"])


def test_a_student_is_planned_without_its_teacher(lit_llm, tmp_path, tiny_llama):
    save_model(tmp_path / "llama", tiny_llama(vocab_size=257), byte_tokenizer())
    distils = ["--model", "lit_llm.objectives.distillation.CausalLMDistillation", "--model.teacher", tmp_path / "llama"]
    outcome = lit_llm("plan", *MAIN, *distils, "--data.tokenizer", "bytes", "--model.network.d_model", 16)
    assert outcome.last_line == (
        "lit-llm: error: model must be without a teacher to be planned, but is a CausalLMDistillation; plan its student "
        "by --model lit_llm.objectives.causal_lm.CausalLM"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--devices", 0], "--devices and --nodes must be at least 1, but are 0 and 1"),
        (["--mfu", 2], "--mfu must be in (0, 1], but is 2"),
        (["--memory", "much"], "size must be a number of bytes with a unit, as 80GiB, but is much"),
        (["--memory", "80"], "size must be a number of bytes with a unit, as 80GiB, but is 80"),
        (["--memory", "1.2.3GiB"], "size must be a number of bytes with a unit, as 80GiB, but is 1.2.3GiB"),
        (["--memory", "."], "size must be a number of bytes with a unit, as 80GiB, but is ."),
        (["--tokens", 0], "--tokens must be finite and above 0, but is 0"),
        (["--tokens", "nan"], "--tokens must be finite and above 0, but is nan"),
        (["--tokens", "inf"], "--tokens must be finite and above 0, but is inf"),
        (["--price", "nan"], "--price must be finite and at least 0, but is nan"),
        (["--model.vocab_size", 0], "model.vocab_size must be at least 1, but is 0"),
        (
            ["--json", f"{__file__}/x.json"],
            f"--json must be a file in a folder that can be written to, but is {__file__}/x.json",
        ),
        (["--probe", 1], "--probe must be at least 2 steps, but is 1"),
    ],
)
def test_a_mistake_is_one_line(lit_llm, words, line):
    outcome = lit_llm("plan", *MAIN, *SMALL, *words)
    assert outcome.code == 2
    assert line in outcome.last_line
    assert not outcome.out


def test_time_says_how_much_of_it_is_computing_and_under_which_strategy(lit_llm):
    words = ["plan", *MAIN, *SMALL, "--tokens", 1e12, "--bandwidth", "1MB"]
    alone, shared = (lit_llm(*words, "--devices", devices).out.splitlines()[-1] for devices in (1, 2))
    assert "under" not in alone
    assert " W at 40% of 9.89e+14/s: " in shared
    assert " under fsdp, limited by communication (" in shared
    bill = {"seconds": 25.6 * 86400, "efficiency": 0.664}
    assert exchange(bill, 8, 0.4) == (" under fsdp, limited by communication (17.0 d of computation): 27% of the peak")
    assert exchange(bill | {"efficiency": 1.0}, 8, 0.4) == " under fsdp, whose communication overlaps with it"


def test_several_batches_of_a_step_are_held_and_exchanged_each(lit_llm, tmp_path):
    words = [*MAIN, *SMALL, "--data.batch_size", 1, "--devices", 2, "--tokens", 1e12, "--bandwidth", "1MB", "--table"]
    alone, added = (plan_of(lit_llm, tmp_path, *words, "--trainer.accumulate_grad_batches", n) for n in (1, 4))
    for name, step in added["steps"].items():
        assert alone["steps"][name]["passes"] < step["passes"]
        assert alone["memory"][name]["ddp"]["peak"] < added["memory"][name]["ddp"]["peak"]
    assert added["bill"] == pytest.approx(alone["bill"])  # four times as many tokens, and four times the communication
    table = added["table"]
    strong = [table[count]["strong_efficiency"] for count in ("8", "16", "32")]
    assert strong[2] == pytest.approx(table["32"]["efficiency"])  # one batch per device
    assert strong == pytest.approx([table[count]["efficiency"] for count in ("8", "16", "32")])


def test_a_row_is_not_shared_out(lit_llm):
    outcome = lit_llm("plan", *MAIN, *SMALL, "--data.batch_size", 2, "--table")
    assert outcome.code == 0, outcome.err
    shared, cut = (next(x for x in outcome.out.splitlines() if x.startswith(f"{n:>8}")) for n in (16, 32))
    assert shared.endswith("%")
    assert cut.endswith("       –")
    assert "strong: the batch of 8 devices, split (– if there are fewer rows than devices)" in outcome.out


def test_pairs_are_planned_where_the_devices_of_a_node_are_even(lit_llm):
    for devices, there in ((2, True), (3, False)):
        outcome = lit_llm("plan", *MAIN, *SMALL, "--devices", devices)
        assert ("fsdp_tensor_parallel" in outcome.out) is there


def test_an_average_of_the_weights_is_counted(lit_llm, tmp_path):
    overlay = ["--config", REPOSITORY / "configs/strategy/weight_average.yaml"]
    found = []
    for words in ([], overlay, ["--trainer.callbacks", "lit_llm.callbacks.weight_average.WeightAverage"]):
        outcome = lit_llm("plan", *MAIN, *SMALL, *words, "--json", tmp_path / "plan.json")
        assert outcome.code == 0, outcome.err
        assert ("trained, plus an average of all" in outcome.out) is bool(words)
        found.append(json.loads((tmp_path / "plan.json").read_text())["steps"]["as configured"])
    assert found[1]["peak"] - found[0]["peak"] == found[0]["weights"] > 0
    assert found[2] == found[1]


def test_a_precision_is_planned_as_the_trainer_reads_it(lit_llm, tmp_path):
    double = plan_of(lit_llm, tmp_path, *MAIN, *SMALL, "--trainer.precision", 64)
    assert double["precision"] == "64-true"
    assert double["steps"]["as configured"]["gradients"] == 8 * double["steps"]["as configured"]["parameters"]
    for name in ("bf16", "auto"):
        mixed = plan_of(lit_llm, tmp_path, *MAIN, *SMALL, "--trainer.precision", name)
        assert mixed["precision"] == "bf16-mixed"
        assert mixed["steps"]["as configured"]["casts"] > 0
    images = ["--config", REPOSITORY / "configs/pretraining/cnn_digits.yaml", "--trainer.precision", "bf16-true"]
    step = step_of(lit_llm, tmp_path, *images)
    assert step["gradients"] == 2 * step["parameters"]
    assert lit_llm("plan", *MAIN, *SMALL, "--trainer.precision", "transformer-engine").last_line == (
        "lit-llm: error: trainer.precision must be one that torch has itself to be planned, but is transformer-engine; "
        "measure it with --probe"
    )
