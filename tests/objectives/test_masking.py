import numpy as np
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lit_llm.data.tokenizer import MARKS, train_bert_bpe, train_bert_uncased_bpe
from lit_llm.objectives.masking import chances, ordinary_tokens, word_edges, word_starts
from tests.examples import twenty_tokens


def rows(batch: int = 400, seq: int = 100) -> torch.Tensor:
    return torch.randint(0, 50, (batch, seq), generator=torch.Generator().manual_seed(3))


def test_chances_are_spread_evenly_and_tell_nothing_of_each_other() -> None:
    ids = rows()
    found = chances(ids, (0, 1), 2)
    assert found.shape == (2, 400, 100)
    assert found.min() >= 0
    assert found.max() < 1
    for drawn in found:
        assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    first = found[0]
    others = [found[1], first.roll(1, 0), first.roll(1, 1), chances(ids, (0, 2), 1)[0], chances(ids, (1, 1), 1)[0]]
    for other in others:
        assert abs(np.corrcoef(first.flatten().numpy(), other.flatten().numpy())[0, 1]) < 0.02


def test_chances_are_those_of_the_row_alone_and_of_all_of_it() -> None:
    ids = rows(4, 10)
    found = chances(ids, (7,), 3)
    assert torch.equal(chances(ids[2:3], (7,), 3)[:, 0], found[:, 2])
    assert torch.equal(chances(ids.flip(0), (7,), 3), found.flip(1))
    for place in range(10):
        changed = ids.clone()
        changed[:, place] += 1
        assert (chances(changed, (7,), 3) != found).any(dim=-1).all()


def test_chances_stay_what_they_were_between_versions() -> None:
    found = chances(torch.tensor([[1, 2, 3]]), (0, 1), 1)[0, 0]
    torch.testing.assert_close(found, torch.tensor([0.1471, 0.0430, 0.0463]), atol=1e-4, rtol=0)


def test_special_tokens_are_not_text() -> None:
    assert ordinary_tokens(twenty_tokens()).tolist() == [False] * 4 + [True] * 16


def words(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> list[str]:
    """The words into which a row of tokens is split."""
    starts = word_starts(torch.tensor([tokenizer.convert_tokens_to_ids(tokens)]), word_edges(tokenizer))[0]
    return ["|".join(tokens[place] for place in torch.where(starts == start)[0]) for start in starts.unique()]


def test_words_of_code_and_prose_are_their_letters_and_what_stands_before_them() -> None:
    texts = ["the parser reads", "self.parse(reader, 12)"] * 9
    tokenizer = train_bert_bpe(texts, 270)
    ids = tokenizer("the parser_reads self.parse(re\n  x2)  12", add_special_tokens=False).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert len(tokens) > 20
    joined = [tokenizer.convert_tokens_to_string(word.split("|")) for word in words(tokenizer, tokens)]
    assert [word.strip(" ") for word in joined if word.strip(" ")] == (
        ["the", "parser_reads", "self", ".parse", "(", "re", "\n", "x2", ")", "12"]
    )


def test_each_chinese_letter_is_a_word_though_it_is_three_tokens() -> None:
    tokenizer = train_bert_bpe(["猫"], 260)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("猫坐 été。a", add_special_tokens=False).input_ids)
    found = words(tokenizer, ["[CLS]", *tokens])
    said = [tokenizer.convert_tokens_to_string(word.split("|")) for word in found]
    assert said == ["[CLS]", "猫", "坐", " ", "été", "。a"]
    assert len(tokens) == 16


def test_a_word_in_lower_case_is_all_that_comes_before_the_next_space() -> None:
    tokenizer = train_bert_uncased_bpe(["Parse the reader"] * 9, 280)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Q parse_xQ, 猫 the", add_special_tokens=False).input_ids)
    found = words(tokenizer, ["[CLS]", *tokens, "[SEP]"])
    said = [tokenizer.convert_tokens_to_string(word.split("|")).strip() for word in found]
    assert said == ["[CLS]", "q", "parse", "_", "xq", ",", "猫", "the", "[SEP]"]


def test_pieces_with_two_hashes_go_on_with_a_word() -> None:
    vocab = {token: index for index, token in enumerate([*MARKS, "un", "##aff", "##able", "a", "."])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    names = {"pad_token": MARKS[0], "cls_token": MARKS[1], "sep_token": MARKS[2], "mask_token": MARKS[3]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    found = words(tokenizer, ["[CLS]", "##able", "un", "##aff", "##able", "a", ".", "##aff", "[SEP]"])
    assert found == ["[CLS]", "##able", "un|##aff|##able", "a", ".|##aff", "[SEP]"]
