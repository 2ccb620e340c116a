import functools
import itertools
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling

from lit_llm.data.text import TextData
from lit_llm.data.tokenizer import train_bert_bpe
from lit_llm.models.llama import Llama
from lit_llm.models.pretrained_masked_lm import PretrainedMaskedLM
from lit_llm.objectives.masked_lm import MaskedLM
from tests.examples import BERT, twenty_tokens
from tests.writing import exactly


def objective(**options) -> MaskedLM:
    torch.manual_seed(0)
    network = functools.partial(PretrainedMaskedLM, config=BERT)
    made = MaskedLM(network, vocab_size=20, **options)
    made.configure_model()
    made.read_tokens_of(twenty_tokens())
    return made


def rows(batch: int = 600, seq: int = 60) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 20, (batch, seq), generator=torch.Generator().manual_seed(0))}


def shares(read: torch.Tensor, ids: torch.Tensor, chosen: torch.Tensor) -> dict[str, float]:
    """The fraction of text tokens that are chosen, and the fractions of these that are masked and unchanged."""
    text = ids > 3
    return {
        "chosen": (chosen.sum() / text.sum()).item(),
        "masked": (read[chosen] == 3).float().mean().item(),
        "same": (read[chosen] == ids[chosen]).float().mean().item(),
    }


@pytest.mark.parametrize("ratio", [0.15, 0.4])
def test_as_much_is_hidden_and_in_the_same_ways_as_by_transformers_collator(ratio: float) -> None:
    batch = rows()
    read, ids, chosen = objective(mask_ratio=ratio).hide(batch, step=5)
    collator = DataCollatorForLanguageModeling(twenty_tokens(), mlm_probability=ratio, seed=0)
    theirs = collator([{"input_ids": row} for row in ids])
    expected = shares(theirs["input_ids"], ids, theirs["labels"] != -100)
    found = shares(read, ids, chosen)
    assert found == pytest.approx(expected, abs=0.02)
    assert found == pytest.approx({"chosen": ratio, "masked": 0.8, "same": 0.1 + 0.1 / 16}, abs=0.015)
    assert torch.equal(read[~chosen], ids[~chosen])
    replaced = read[chosen & (read != 3) & (read != ids)]
    assert set(replaced.tolist()) == set(range(4, 20))
    assert not chosen[ids <= 3].any()


def test_a_row_opens_and_ends_as_any_text_does() -> None:
    read, ids, chosen = objective().hide(rows(), step=0)
    assert torch.equal(read[:, [0, -1]], torch.tensor([[1, 2]]).expand(600, 2))
    assert torch.equal(ids[:, [0, -1]], read[:, [0, -1]])
    assert not chosen[:, [0, -1]].any()


def test_other_tokens_are_hidden_at_each_step_and_with_each_seed_but_the_same_again() -> None:
    batch = rows(20)
    hidden = [objective().hide(batch, step)[2] for step in (3, 4, 3)]
    assert torch.equal(hidden[0], hidden[2])
    assert not torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0], objective(mask_seed=1).hide(batch, 3)[2])
    one = {"input_ids": batch["input_ids"][4:5]}
    assert torch.equal(objective().hide(one, 3)[0], objective().hide(batch, 3)[0][4:5])


def test_whole_words_are_hidden_or_none_of_them() -> None:
    tokenizer = train_bert_bpe(["the parser reads a letter"] * 9, 262)
    made = objective(whole_words=True, mask_ratio=0.3)
    made.read_tokens_of(tokenizer)
    text = "the parser reads letters, and the reader writes parsers. " * 4
    ids = torch.tensor([tokenizer(text).input_ids])
    _, ids, chosen = made.hide({"input_ids": ids}, 0)
    letters = [tokenizer.decode([token]) for token in ids[0].tolist()]
    inside = [a[-1:].isalpha() and b[:1].isalpha() for a, b in itertools.pairwise(letters)]
    same = (chosen[0, 1:] == chosen[0, :-1]).tolist()
    assert all(together for together, within in zip(same, inside) if within)
    assert sum(inside) > 50
    assert 0.1 < chosen.float().mean() < 0.5
    made.read_tokens_of(tokenizer)
    made.word_edges = None
    same = made.hide({"input_ids": ids}, 0)[2]
    assert not all((same[0, 1:] == same[0, :-1])[torch.tensor(inside)])


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    made = objective().eval()
    made.trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    batch = rows(8)
    total, targets = made.loss(batch)
    read, ids, chosen = made.hide(batch, 0)
    theirs = made.network.model
    assert type(theirs) is BertForMaskedLM
    expected = theirs(read, labels=ids.masked_fill(~chosen, -100))
    torch.testing.assert_close(total / targets, expected.loss, atol=1e-5, rtol=1e-5)
    assert targets == chosen.sum()
    planned, targets = made.planned_loss(batch)
    expected = theirs(batch["input_ids"]).logits.flatten(0, 1)[: int(targets)]
    expected = torch.nn.functional.cross_entropy(expected, batch["input_ids"].flatten()[: int(targets)])
    torch.testing.assert_close(planned / targets, expected, atol=1e-5, rtol=1e-5)
    assert targets == round(0.15 * 8 * 60)
    read, ids, chosen = made.hide(batch)
    made.measure(made.val_metric, batch)
    found, logits = made.val_metric.compute(), theirs(read).logits[chosen]
    expected = torch.nn.functional.cross_entropy(logits, ids[chosen])
    torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["perplexity"], expected.exp(), atol=1e-4, rtol=1e-4)
    assert found["accuracy"].item() == pytest.approx((logits.argmax(-1) == ids[chosen]).float().mean().item())


def data(corpus: Path, **options) -> TextData:
    return TextData(
        path=str(corpus), tokenizer="bert-bpe-270", seq_len=32, batch_size=4, validation_fraction=0.2, **options
    )


def trainer(folder: Path, steps: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        limit_val_batches=2,
    )


def fresh(**options) -> MaskedLM:
    return MaskedLM(functools.partial(PretrainedMaskedLM, config=BERT), **options)


@pytest.mark.parametrize("mask_documents", [False, True])
def test_a_run_in_two_parts_ends_where_a_whole_one_does(corpus: Path, tmp_path: Path, mask_documents: bool) -> None:
    def fitted(steps: int, start: Path | None = None) -> tuple[Trainer, MaskedLM]:
        torch.manual_seed(steps)  # random numbers drawn before loading a checkpoint must not matter
        run, made = trainer(tmp_path, steps), fresh(whole_words=True)
        if start is None:
            torch.manual_seed(0)
        run.fit(made, data(corpus, mask_documents=mask_documents), ckpt_path=start, weights_only=True)
        return run, made

    _, whole = fitted(6)
    run, _ = fitted(3)
    run.save_checkpoint(tmp_path / "x.ckpt")
    _, rest = fitted(6, tmp_path / "x.ckpt")
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, rest.network.state_dict()[name])


def test_each_validation_hides_the_same(corpus: Path, tmp_path: Path) -> None:
    made, run = fresh(), trainer(tmp_path, 1)
    source = data(corpus)
    run.fit(made, source)
    found = []
    for _ in range(2):
        run.validate(made, source, verbose=False)
        found.append({name: value.item() for name, value in run.callback_metrics.items()})
    assert found[0] == found[1]
    assert set(found[0]) == {"val/loss", "val/perplexity", "val/accuracy"}


def test_a_tokeniser_without_a_mask_token_is_refused(corpus: Path, tmp_path: Path) -> None:
    made = TextData(path=str(corpus), tokenizer="bytes", seq_len=32, batch_size=4)
    message = "data.tokenizer must have a mask token for MaskedLM, but bytes has none; set it to bert-uncased-bpe-8192"
    with pytest.raises(ValueError, match=exactly(message)):
        trainer(tmp_path, 1).fit(fresh(), made)


def test_a_network_that_fills_in_nothing_is_refused() -> None:
    made = MaskedLM(functools.partial(Llama, d_model=16, num_layers=1, num_heads=2), vocab_size=20)
    message = "model.network must be a masked language model for MaskedLM, but is a Llama"
    with pytest.raises(TypeError, match=exactly(message)):
        made.configure_model()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_ratio_that_hides_nothing_or_all_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=exactly(f"model.mask_ratio must be in (0, 1), but is {ratio}")):
        fresh(mask_ratio=ratio)


def test_there_is_nothing_to_predict() -> None:
    with pytest.raises(ValueError, match=r"\Amodel must be an objective that predicts something of each row, but is "):
        objective().predict_step(rows(), 0)
