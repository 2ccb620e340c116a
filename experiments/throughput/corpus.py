"""A generated corpus with a vocabulary of exactly the given size, as text and as tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch


def prepare(folder: Path, vocab_size: int, num_tokens: int) -> None:
    """Writes `text.jsonl`, `tokenizer/` and `tokens.npy`, the training tokens as `TextData` lays them out.

    Word frequencies follow Zipf's law, and every second word is a function of the one before, so that there is
    something to learn.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lit_llm.data.text import TextData

    folder.mkdir(parents=True, exist_ok=True)
    words = ["<|endoftext|>", *(f"w{index}" for index in range(1, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0]).save_pretrained(folder / "tokenizer")

    chance = np.random.default_rng(0)
    frequency = 1 / (np.arange(1, vocab_size) + 2.7)
    first = 1 + chance.choice(vocab_size - 1, size=num_tokens // 2, p=frequency / frequency.sum())
    follows = 1 + chance.permutation(vocab_size)[: vocab_size - 1] % (vocab_size - 1)
    stream = np.stack([first, follows[first - 1]], axis=1).ravel()
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for document in np.array_split(stream, max(1, len(stream) // 2000)):
            file.write(json.dumps({"text": " ".join(words[index] for index in document)}) + "\n")

    data = TextData(
        str(folder / "text.jsonl"), tokenizer=str(folder / "tokenizer"), validation_fraction=0.0, test_fraction=0.0
    )
    data.prepare_data()
    data.setup("test")
    if data.vocab_size != vocab_size:
        raise ValueError(f"vocab_size must be what was asked for, {vocab_size}, but is {data.vocab_size}")
    np.save(folder / "tokens.npy", data.cache.split("train").tokens)


def batches(
    folder: Path, seq_len: int, batch_size: int, device: str = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of inputs and labels from memory, in the order in which `TextData` draws its rows."""
    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64)).to(device)
    rows = (len(tokens) - 1) // seq_len
    for epoch in itertools.count():
        order = torch.from_numpy(np.random.default_rng((0, epoch)).permutation(rows)).to(device)
        for chosen in order[: rows // batch_size * batch_size].view(-1, batch_size):
            window = tokens[chosen[:, None] * seq_len + torch.arange(seq_len + 1, device=device)]
            yield window[:, :-1].contiguous(), window[:, 1:].contiguous()
