"""`lit-llm tokenizer`: trains a tokeniser on a corpus."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lit_llm.cli.parser import OneLineArguments


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    train(**vars(_parser().parse_args(words[1:])))


def _parser() -> argparse.ArgumentParser:
    from lit_llm.data.tokenizer import KINDS

    parser = OneLineArguments(
        prog="lit-llm tokenizer",
        description="Train a tokeniser on a whole corpus, given as for lit_llm.data.text.TextData. Use it with "
        "--data.tokenizer DIR. (A run can also train its own tokeniser on its training documents only: "
        "--data.tokenizer bpe-4096.)",
        epilog="example: lit-llm tokenizer --path texts/ --vocab_size 8192 --out tokenizers/texts",
    )
    parser.add_argument("--path", default="stdlib", help="corpus, as data.path of a run (default stdlib)")
    parser.add_argument("--subset", help="configuration of a hub data set")
    parser.add_argument("--column", default="text", help="column of a table that holds the text (default text)")
    parser.add_argument("--max_documents", type=int, help="read only this many documents")
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="bpe",
        help="bpe (byte-level, the default) for a decoder, bert-uncased-bpe or bert-bpe for an encoder, t5-bpe for an "
        "encoder-decoder",
    )
    parser.add_argument("--vocab_size", type=int, default=4096, help="size of the vocabulary (default 4096)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to; must not exist yet")
    return parser


def train(
    path: str, subset: str | None, column: str, max_documents: int | None, kind: str, vocab_size: int, out: Path
) -> None:
    """Trains a tokeniser and prints its bytes per token; arguments as in `lit-llm tokenizer --help`.

    Raises:
        ValueError: When `out` already exists, or the corpus is empty.
    """
    from lit_llm.data.cleaning import Cleaning
    from lit_llm.data.pretokenization import DocumentEncoder
    from lit_llm.data.text import read_texts
    from lit_llm.data.tokenizer import training_of
    from lit_llm.files import replacing

    if out.exists():
        raise ValueError(f"--out must be a new folder, but {out} exists")
    started = time.perf_counter()
    texts = list(read_texts(path, subset, column, max_documents, Cleaning()))
    if not texts:
        raise ValueError(f"--path must hold text, but {path} has none")
    tokenizer = training_of(f"{kind}-{vocab_size}")(texts)
    with replacing(out) as new:
        tokenizer.save_pretrained(new)
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(map(len, DocumentEncoder(tokenizer).encode(texts)))
    print(
        f"{len(tokenizer):,} tokens from {len(texts):,} documents, {size / 1e6:.1f} MB, in "
        f"{time.perf_counter() - started:.0f} s: {size / tokens:.2f} bytes per token; written to {out}"
    )
