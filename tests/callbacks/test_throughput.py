from __future__ import annotations

import functools

import pytest
import torch
from lightning.pytorch import Callback

from lit_llm.callbacks import throughput
from lit_llm.callbacks.throughput import Throughput, count_items, peak_flops, peak_memory
from lit_llm.models.cnn import CNN
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.classification import Classification
from tests.examples import BERT, Examples
from tests.image_batches import Images
from tests.objectives.test_classification import trainer


def test_text_is_counted_in_tokens_and_all_else_in_rows():
    assert count_items({"input_ids": torch.zeros(3, 5), "labels": torch.zeros(3, 5)}) == 15
    assert count_items({"image": torch.zeros(4, 1, 28, 28)}) == 4
    assert count_items((torch.zeros(2, 8), torch.zeros(2))) == 2


def test_the_peak_of_a_cpu_is_one_that_a_product_reaches():
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < peak < 1e14


@pytest.mark.parametrize(
    ("precision", "fast", "peak"),
    [
        ("bf16-mixed", True, torch.bfloat16),
        ("bf16-mixed", False, torch.float32),
        ("16-true", True, torch.float32),
        ("64-true", False, torch.float64),
        ("32-true", True, torch.float32),
    ],
)
def test_the_peak_is_that_of_the_precision_unless_the_cpu_emulates_it(tmp_path, monkeypatch, precision, fast, peak):
    measured = []
    monkeypatch.setattr(throughput, "multiplies_bfloat16", lambda kind: fast)
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: measured.append(dtype) or 1e9)
    made = Classification(functools.partial(PretrainedClassifier, config=BERT))
    fitting = trainer(tmp_path, max_steps=1, precision=precision, callbacks=[Throughput()])
    fitting.fit(made, datamodule=Examples(3))
    assert measured == [peak]


def test_memory_is_that_of_this_process():
    before = peak_memory(torch.device("cpu"))
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory(torch.device("cpu")) >= before > kept.numel()


def test_the_steps_after_the_last_report_are_counted_too(tmp_path):
    clock = Throughput()
    made = Classification(functools.partial(PretrainedClassifier, config=BERT))
    trainer(tmp_path, max_epochs=2, log_every_n_steps=4, callbacks=[clock]).fit(made, datamodule=Examples(3))
    assert clock.tokens == 2 * 24 * 6
    reported = clock.latest
    assert reported["train/tokens"] == 4 * 8 * 6
    assert clock.seconds > reported["train/seconds"]
    assert clock.unit == "tok"


def test_what_is_saved_between_two_reports_counts_seconds_as_it_does_tokens(tmp_path):
    class Saved(Callback):
        states: list[dict] = []  # noqa: RUF012

        def on_train_batch_end(self, *args):
            self.states.append(clock.state_dict())

    clock, saved = Throughput(), Saved()
    made = Classification(functools.partial(PretrainedClassifier, config=BERT))
    trainer(tmp_path, max_epochs=1, log_every_n_steps=100, callbacks=[clock, saved]).fit(made, datamodule=Examples(3))
    seconds = [state["seconds"] for state in saved.states]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] <= clock.seconds


def test_a_rate_of_images_is_shown_as_rows(tmp_path):
    clock = Throughput()
    trainer(tmp_path, max_epochs=1, log_every_n_steps=1, callbacks=[clock]).fit(
        Classification(CNN), datamodule=Images()
    )
    assert clock.unit == "rows"
    assert clock.tokens == 24


def test_of_a_batch_without_token_ids_no_operations_are_counted(tmp_path):
    class Told(CNN):
        def flops_per_token(self, seq_len: int) -> float:
            return 1.0

    clock = Throughput()
    made = Classification(Told)
    trainer(tmp_path, max_epochs=1, log_every_n_steps=1, callbacks=[clock]).fit(made, datamodule=Images())
    assert "train/loss" in clock.latest
    assert "train/mfu" not in clock.latest
