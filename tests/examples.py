"""A data module of small labelled examples, for tests of code that reads them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lit_llm.data.tokenizer import byte_tokenizer

BERT = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
}


def twenty_tokens() -> PreTrainedTokenizerFast:
    """A tokeniser with four special tokens, twelve words and four sentinels; `[SEP]` is also the end token."""
    marks, sentinels = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"], [f"<extra_id_{number}>" for number in range(4)]
    words = [*marks, *"abcdefghijkl", *sentinels]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", **names)


def bytes_with_bos() -> PreTrainedTokenizerFast:
    """A byte tokeniser that puts a BOS, which is not the boundary token, before each text, like those of Llama."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    opened = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = opened
    return tokenizer


class Submission(NamedTuple):
    file: str
    labels: str
    limits: tuple[float, float] = (-math.inf, math.inf)


def example(row: int, num_classes: int | None, labelled: bool = True) -> dict[str, torch.Tensor]:
    """A batch of one example, whose label depends on the row and is shown by the first token."""
    draw = torch.Generator().manual_seed(row)
    ids = torch.randint(8, 20, (1, 6), generator=draw)
    ids[:, 0] = 1 + row % (num_classes or 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "rows": torch.tensor([row])}
    if labelled:
        batch["labels"] = torch.tensor([row % num_classes]) if num_classes else torch.tensor([row % 5 / 2])
    return batch


def together(batches: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: together([batch[name] for batch in batches])
        if isinstance(batches[0][name], dict)
        else torch.cat([batch[name] for batch in batches])
        for name in batches[0]
    }


def partly_labelled(row: int, num_classes: int, unlabelled: int = 2) -> dict[str, Any]:
    """A labelled example with unlabelled ones; their strongly augmented views differ in the last token."""
    weak = together([example(1000 + row * unlabelled + n, num_classes) for n in range(unlabelled)])
    strong = weak | {"input_ids": weak["input_ids"].clone()}
    strong["input_ids"][:, -1] = 8
    return example(row, num_classes) | {"unlabelled": weak, "unlabelled_strong": strong}


class Examples(LightningDataModule):
    """24 training and 11 validation examples with classes or values, which without `known` only a checkpoint has."""

    submission: Submission | None = None
    predict_split = "test"

    def __init__(
        self, num_classes: int | None = 3, counts: list[int] | None = None, test_labels: bool = True, known: bool = True
    ) -> None:
        super().__init__()
        self.num_classes, self.num_targets = num_classes, None if num_classes else 1
        self.class_names = [f"class {index}" for index in range(num_classes or 0)]
        self.class_counts = counts or [8] * (num_classes or 0)
        self.test_labels = test_labels
        if not known:
            self.num_classes = self.num_targets = None
            self.class_names = []

    def _batches(self, rows: range, size: int, labelled: bool = True) -> DataLoader:
        singles = [example(row, self.num_classes, labelled) for row in rows]
        return DataLoader([together(singles[i : i + size]) for i in range(0, len(rows), size)], batch_size=None)

    def train_dataloader(self) -> DataLoader:
        return self._batches(range(24), 8)

    def val_dataloader(self) -> DataLoader:
        return self._batches(range(100, 111), 4)

    def test_dataloader(self) -> DataLoader:
        return self._batches(range(200, 207), 4)

    def predict_dataloader(self) -> DataLoader:
        return self._batches(range(7), 4, self.test_labels)

    def state_dict(self) -> dict[str, Any]:
        return {"class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.class_names = state_dict["class_names"]

    def texts(self, split: str, rows: list[int]) -> list[dict[str, Any]]:
        return [{"sentence": f"{split} {row}, said twice", "label": -1} for row in rows]

    def label_name(self, index: int) -> str:
        return self.class_names[index]


class Loaders(LightningDataModule):
    """The batches of `Examples`, with or without `rows`, in a module with only loaders and the number of classes."""

    def __init__(self, num_classes: int | None, rows: bool) -> None:
        super().__init__()
        self.num_classes, self.num_targets = num_classes, None if num_classes else 1
        self.has_rows, self._examples = rows, Examples(num_classes)

    def _batches(self, name: str) -> DataLoader:
        batches = getattr(self._examples, name)()
        kept = [b if self.has_rows else {k: v for k, v in b.items() if k != "rows"} for b in batches]
        return DataLoader(kept, batch_size=None)

    def train_dataloader(self) -> DataLoader:
        return self._batches("train_dataloader")

    def val_dataloader(self) -> DataLoader:
        return self._batches("val_dataloader")

    def predict_dataloader(self) -> DataLoader:
        return self._batches("predict_dataloader")
