from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_llm.data.tokenizer import byte_tokenizer, character_tokenizer, train_bert_uncased_bpe, train_bpe, train_t5_bpe
from lit_llm.generation import MAX_HELD, IncrementalDetokenizer, generate, sample, stream_tokens, until
from lit_llm.models.gpt2 import GPT2
from lit_llm.models.pretrained import PretrainedCausalLM
from lit_llm.models.recurrent import GRU
from tests.writing import exactly

PROMPTS = [[5], [3, 14, 15, 9, 2, 6], [1, 2, 3], [8, 8, 8, 8]]
NEW = 9


def greedy(network: torch.nn.Module, prompt: list[int], new: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(network(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


# Sampling.


def drawn(logits: torch.Tensor, times: int = 3000, **options: object) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    return Counter(sample(logits.expand(times, -1), generator=generator, **options).tolist())


def test_temperature_zero_takes_the_likeliest_whatever_else_is_asked_for() -> None:
    logits = torch.randn(5, 20)
    expected = logits.argmax(-1)
    assert torch.equal(sample(logits, temperature=0.0), expected)
    assert torch.equal(sample(logits, temperature=0.0, top_k=3, top_p=0.5), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probability_that_they_have(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    probabilities = (logits / temperature).softmax(-1).tolist()
    counts = drawn(logits, 20_000, temperature=temperature)
    assert [counts[token] / 20_000 for token in range(4)] == pytest.approx(probabilities, abs=0.015)


@pytest.mark.parametrize("top_k", [1, 2, 5, 100])
def test_top_k_keeps_the_likeliest(top_k: int) -> None:
    logits = torch.randn(8)
    likeliest = sorted(range(8), key=lambda token: -logits[token])[:top_k]
    assert set(drawn(logits, temperature=3.0, top_k=top_k)) == set(likeliest)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.62, 0.9, 1.0])
def test_top_p_keeps_the_fewest_that_reach_the_probability(top_p: float) -> None:
    logits = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05]).log()
    kept, reached = set(), 0.0
    for token in sorted(range(5), key=lambda token: -logits[token]):
        if reached < top_p and (top_p == 1 or reached < top_p - 1e-6):
            kept.add(token)
            reached += logits[token].exp().item()
    assert set(drawn(logits, top_p=top_p)) == kept


def test_a_top_p_that_is_0_in_fp32_keeps_the_likeliest() -> None:
    assert set(drawn(torch.tensor([0.1, 0.5, 0.4]).log(), top_p=1e-50)) == {1}


def test_top_p_is_taken_of_what_temperature_and_top_k_leave() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(drawn(logits, top_k=3, top_p=0.6)) == {0, 1}  # 4/9 and 3/9
    assert set(drawn(logits, top_k=2, top_p=0.57)) == {0}  # 4/7
    assert set(drawn(logits, temperature=0.5, top_p=0.5)) == {0}  # 16/30


def test_each_row_is_cut_on_its_own() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]).repeat(200, 1)
    assert sample(logits, top_p=0.5).tolist() == [0, 2] * 200
    assert sample(logits, top_k=1).tolist() == [0, 2] * 200


# Generating.


@pytest.mark.parametrize("variant", [{}, {"num_kv_heads": 2, "qk_norm": True, "tie_embeddings": True}], ids=str)
def test_greedy_with_a_cache_is_greedy_without_and_prompts_do_not_disturb_each_other(tiny_llama, variant) -> None:
    network = tiny_llama(**variant)
    expected = [greedy(network, prompt, NEW) for prompt in PROMPTS]
    assert generate(network, PROMPTS, NEW, temperature=0.0) == expected
    assert [generate(network, [prompt], NEW, temperature=0.0)[0] for prompt in PROMPTS] == expected
    assert len({tuple(text) for text in expected}) == len(PROMPTS)


@pytest.mark.parametrize("kind", [GRU, GPT2, PretrainedCausalLM, "capped logits"])
def test_networks_of_all_kinds_read_prompts_of_one_length_as_each_alone(kind) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 3, **sizes}
    if kind == "capped logits":  # has no separate head
        kind, config = PretrainedCausalLM, {**config, "model_type": "gemma2", "head_dim": 8}
    torch.manual_seed(0)
    network = kind(37, config) if kind is PretrainedCausalLM else kind(37, 24)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p))
    prompts = [[3, 14, 15, 9, 2, 6], [1, 2, 3, 4, 5, 6]]
    expected = [greedy(network.eval(), prompt, NEW) for prompt in prompts]
    assert generate(network, prompts, NEW, temperature=0.0) == expected


def test_a_prompt_makes_no_mask_and_logits_of_its_last_position_alone(tiny_llama) -> None:
    network, masks, rows = tiny_llama(), [], []
    network.layers[0].register_forward_pre_hook(lambda module, args: masks.append(args[2]))
    network.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    generate(network, [[3, 14, 15, 9, 2, 6], [1, 2, 3, 4, 5, 6]], 3, temperature=0.0)
    assert masks[0] is None
    generate(network, PROMPTS, 3, temperature=0.0)
    assert masks[3].shape == (4, 1, 6, 6)
    assert rows == [1] * 6


def test_the_seed_alone_decides_the_text(tiny_llama) -> None:
    network, texts = tiny_llama(), []
    for seed in (1, 1, 2):
        torch.manual_seed(len(texts))  # must have no effect
        texts.append(generate(network, PROMPTS, NEW, seed=seed))
    assert texts[0] == texts[1] != texts[2]


def test_generating_with_a_seed_leaves_the_global_chance_alone(tiny_llama) -> None:
    network = tiny_llama()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    generate(network, PROMPTS, NEW, seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_without_a_seed_two_texts_differ(tiny_llama) -> None:
    network = tiny_llama()
    assert generate(network, PROMPTS, NEW, temperature=2.0) != generate(network, PROMPTS, NEW, temperature=2.0)


def test_the_likeliest_of_one_is_greedy(tiny_llama) -> None:
    network = tiny_llama()
    expected = generate(network, PROMPTS, NEW, temperature=0.0)
    assert generate(network, PROMPTS, NEW, top_k=1) == expected
    assert generate(network, PROMPTS, NEW, top_p=1e-6) == expected


def test_a_text_ends_before_the_stop_token_and_the_others_go_on(tiny_llama) -> None:
    network = tiny_llama()
    free = generate(network, PROMPTS, NEW, temperature=0.0)
    stop = free[1][3]
    expected = [text[: text.index(stop)] if stop in text else text for text in free]
    assert generate(network, PROMPTS, NEW, temperature=0.0, stop=stop) == expected
    assert {len(text) for text in expected} != {NEW}


def test_when_all_texts_have_ended_nothing_more_is_computed(tiny_llama) -> None:
    network, calls = tiny_llama(), []
    network.embed_tokens.register_forward_hook(lambda *args: calls.append(0))
    stop = generate(network, PROMPTS[:1], 3, temperature=0.0)[0][0]
    calls.clear()
    assert generate(network, PROMPTS[:1], NEW, temperature=0.0, stop=stop) == [[]]
    assert len(calls) == 1


def test_tokens_are_handed_over_as_they_come(tiny_llama) -> None:
    network = tiny_llama()
    stop = generate(network, PROMPTS, NEW, temperature=0.0)[1][3]
    texts = generate(network, PROMPTS, NEW, temperature=0.0, stop=stop)
    taken = list(stream_tokens(network, PROMPTS, NEW, temperature=0.0, stop=stop))
    assert [[token for token in column if token is not None] for column in zip(*taken)] == texts
    for column in zip(*taken):
        ended = [token is None for token in column]
        assert ended == sorted(ended)
    assert 1 <= len(taken) <= NEW


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["two"], "one "),
        (["thr", "two"], "one "),
        (["ree"], "one two th"),
        (["x"], "one two three"),
        ([], "one two three"),
    ],
)
def test_a_text_ends_where_a_stop_begins_however_it_is_cut(stops: list[str], text: str) -> None:
    whole = "one two three"
    for size in (1, 2, 5, 20):
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        assert "".join(until(pieces, stops)) == text


def test_what_may_begin_a_stop_is_held_back_and_given_out_where_it_does_not() -> None:
    assert list(until(["on", "e t", "ea"], ["two"])) == ["on", "e ", "tea"]


# Incremental detokenisation.

WRITTEN = ["  the sea, and\tit's\n\n    green", "第3篇 山高月小，水落石出。", "é 😀👨‍👩‍👧 x😀 ", "a b</s>c "]


def learnt(
    model: models.Model, decoder: decoders.Decoder, trainer: trainers.Trainer, **parts
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(WRITTEN[:2], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokeniser like those of T5 and ALBERT."""
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    space = pre_tokenizers.Metaspace()
    return learnt(models.Unigram(), decoders.Metaspace(), trainer, pre_tokenizer=space)


def sentencepiece_with_bytes() -> PreTrainedTokenizerFast:
    """A tokeniser like that of Llama 2: unknown characters become bytes."""
    marks = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=marks, show_progress=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model = models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return learnt(model, decoders.Sequence(steps), trainer, normalizer=spaces)


def word_pieces() -> PreTrainedTokenizerFast:
    """A tokeniser like that of BERT."""
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"], show_progress=False)
    words = pre_tokenizers.BertPreTokenizer()
    return learnt(models.WordPiece(unk_token="<unk>"), decoders.WordPiece(), trainer, pre_tokenizer=words)


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "characters": lambda: character_tokenizer(WRITTEN),
    "bpe": lambda: train_bpe(WRITTEN, 280),
    "bert-uncased-bpe": lambda: train_bert_uncased_bpe(WRITTEN, 280),
    "t5-bpe": lambda: train_t5_bpe(WRITTEN, 380),
    "sentencepiece": sentencepiece,
    "sentencepiece with bytes": sentencepiece_with_bytes,
    "word pieces": word_pieces,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("known", [0, 4])
def test_the_pieces_of_a_text_are_the_text_and_whole_characters(kind: str, known: int) -> None:
    tokenizer = TOKENIZERS[kind]()
    for text in WRITTEN:
        ids = tokenizer.encode(text, add_special_tokens=False)
        while tokenizer.decode(ids[:known]).endswith("\ufffd"):
            known += 1
        writing = IncrementalDetokenizer(tokenizer, ids[:known])
        pieces = [writing.add(token) for token in ids[known:]]
        assert writing.rest() == ""
        assert tokenizer.decode(ids[:known]) + "".join(pieces) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(pieces)
        assert writing.tokens == ids


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_bytes_that_are_no_character_are_given_out_in_the_end(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    first = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("é")[0][0][0]  # an incomplete character
    ids = [*tokenizer.encode("a"), *[tokenizer.convert_tokens_to_ids(first)] * 40, *tokenizer.encode("b😀")[:-1]]
    writing = IncrementalDetokenizer(tokenizer)
    pieces = [writing.add(token) for token in ids]
    assert pieces[: MAX_HELD + 1] == ["a", *[""] * (MAX_HELD - 1), "\ufffd" * MAX_HELD]
    assert "".join(pieces) + writing.rest() == tokenizer.decode(ids)


def test_no_more_is_decoded_for_the_last_token_than_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, counts = byte_tokenizer(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: counts.append(len(ids)) or decode(ids))
    writing = IncrementalDetokenizer(tokenizer)
    for token in tokenizer.encode("ab😀" * 50):
        writing.add(token)
    assert max(counts) <= 8  # two characters of four bytes


def test_the_last_place_of_the_network_can_be_used_and_no_more(tiny_llama) -> None:
    network = tiny_llama(max_seq_len=10)
    assert generate(network, [[1, 2, 3]], 7, temperature=0.0) == [greedy(network, [1, 2, 3], 7)]
    message = (
        "max_new_tokens must be at most 7, which is what the network's max_seq_len 10 leaves after a prompt of "
        "3 tokens, but is 8"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        generate(network, [[1, 2, 3], [1]], 8)


def test_a_prompt_longer_than_the_network_reads_leaves_nothing(tiny_llama) -> None:
    for new, room in ((0, 2), (1, 1), (2, 1)):
        message = (
            f"prompt must be at most {room} tokens, which the network's max_seq_len 2 has room to go on from, but is 3; "
            f"shorten it"
        )
        with pytest.raises(ValueError, match=exactly(message)):
            generate(tiny_llama(max_seq_len=2), [[1, 2, 3]], new)


def test_no_new_tokens_are_no_tokens(tiny_llama) -> None:
    assert generate(tiny_llama(), PROMPTS, 0) == [[], [], [], []]


@pytest.mark.parametrize("training", [False, True])
def test_the_network_stays_in_the_mode_it_was_in(tiny_llama, training: bool) -> None:
    network = tiny_llama().train(training)
    generate(network, PROMPTS, 2)
    assert network.training == training

    begun = stream_tokens(network, PROMPTS, 2)
    next(begun)
    begun.close()
    assert network.training == training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.5}, "temperature must be finite and at least 0, but is -0.5"),
        ({"top_k": 0}, "top_k must be at least 1, but is 0"),
        ({"top_p": 0.0}, "top_p must be in (0, 1], but is 0.0"),
        ({"top_p": 1.5}, "top_p must be in (0, 1], but is 1.5"),
        ({"prompts": [[1], []]}, "prompt must hold at least one token, but is empty"),
    ],
)
def test_values_out_of_range_are_refused(tiny_llama, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        generate(tiny_llama(), **({"prompts": PROMPTS, "max_new_tokens": 2} | changes))


@pytest.mark.parametrize("changes", [{"prompts": []}, {"max_new_tokens": -1}], ids=str)
def test_nothing_to_continue_is_refused_in_the_grammar(tiny_llama, changes: dict) -> None:
    with pytest.raises(ValueError, match=r"\A\w+ must .*, but is "):
        generate(tiny_llama(), **({"prompts": PROMPTS, "max_new_tokens": 2} | changes))
