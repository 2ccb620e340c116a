"""Reading speed of a token cache (tokens per second), and writing speed (megabytes of text per second).

    python -m experiments.throughput.loader

Reading: `TextData`'s training loader and nanoGPT's `get_batch` (github.com/karpathy/nanoGPT, train.py), with 12 rows of
256 tokens; first after the file was dropped from the page cache, then again. Resuming: time from loading a loader's
state to its next batch, at step 100 and at step 1,000,000. Writing: the text of the standard library through the same
byte-pair encoding of 8,192 tokens, by `lit-llm fit`'s cache, by `datasets.map` into a flat file, and by the tokeniser
alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.throughput.report import environment, wait_for_quiet, write_table

if TYPE_CHECKING:
    from lit_llm.data.text import TextData

SEQ_LEN, BATCH_SIZE = 256, 12
RESUMED = (100, 1_000_000)
READERS = ("TextData", "nanoGPT's get_batch")
WRITERS = ("lit-llm fit's cache", "datasets.map, num_proc=2", "encode_batch_fast alone")


def main() -> None:
    """Parses the options, measures, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--path", default="stdlib", help="a corpus as `TextData` takes it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max_wait", type=float, default=120.0)
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"))
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.one:
        print(json.dumps(one(options)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    child(options, "prepare")
    if options.table:
        write_table("resuming", resuming(child(options, "resume")))
    reading: dict[str, list[dict[str, float]]] = {}
    writing: dict[str, list[dict[str, float]]] = {}
    busiest = 0.0
    for _ in range(options.rounds):
        for name in (*READERS, *WRITERS):
            busiest = max(busiest, wait_for_quiet(options.max_wait))
            result = child(options, name)
            (reading if name in READERS else writing).setdefault(name, []).append(result)
            print(name, result, flush=True)
    if options.table:
        note = f"Median of {options.rounds} interleaved rounds and their range; others used at most {busiest:.2f} cores"
        write_table("loading", [f"{note} before a run.", "", *columns(reading, "million tokens/s", 1e6)])
        write_table("tokenising", [f"{note} before a run.", "", *columns(writing, "MB/s", 1e6)])


def child(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Makes one measurement in its own process."""
    words = ["--one", name, "--batches", str(options.batches), "--path", options.path, "--work", str(options.work)]
    env = environment(options.work, options.threads)
    command = [sys.executable, "-m", "experiments.throughput.loader", *words]
    return json.loads(subprocess.check_output(command, env=env, text=True).splitlines()[-1])


def one(options: argparse.Namespace) -> dict[str, float]:
    """Makes the measurement of a child process."""
    if options.one == "prepare":
        prepare(options)
        return {}
    if options.one == "resume":
        return resume(options)
    return read(options) if options.one in READERS else write(options)


def data(options: argparse.Namespace) -> TextData:
    """The corpus, with the tokeniser that `prepare` trained."""
    from lit_llm.data.text import TextData

    return TextData(
        options.path,
        tokenizer=str(options.work / "bpe-8192"),
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        test_fraction=0.0,
    )


def prepare(options: argparse.Namespace) -> None:
    """Trains the tokeniser, builds the cache, and writes the texts as JSON for the other writers."""
    from lit_llm.data.cleaning import Cleaning
    from lit_llm.data.text import read_texts
    from lit_llm.data.tokenizer import train_bpe

    if not (options.work / "texts.json").exists():
        texts = list(read_texts(options.path, None, "text", None, Cleaning()))
        train_bpe(texts, 8192).save_pretrained(options.work / "bpe-8192")
        (options.work / "texts.json").write_text(json.dumps(texts))
    data(options).prepare_data()


def read(options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second: `cold` after the file was dropped from the page cache, `warm` right after."""
    import numpy as np
    import torch

    module = data(options)
    module.setup("test")
    path = module.cache.folder / "train.tokens"
    dtype = module.manifest["dtype"]

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = np.memmap(path, dtype=dtype, mode="r")
        starts = torch.randint(len(tokens) - SEQ_LEN, (BATCH_SIZE,))
        x = torch.stack([torch.from_numpy(tokens[i : i + SEQ_LEN].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in starts])
        return x, y

    found = {}
    for state in ("cold", "warm"):
        if state == "cold":
            forget(path)
        started = time.perf_counter()
        if options.one == "TextData":
            epochs = itertools.chain.from_iterable(iter(module.train_dataloader, None))
            for _ in itertools.islice(epochs, options.batches):
                pass
        else:
            for _ in range(options.batches):
                get_batch()
        found[state] = options.batches * BATCH_SIZE * SEQ_LEN / (time.perf_counter() - started)
    return found


def resume(options: argparse.Namespace) -> dict[str, float]:
    """Seconds from loading the state of each step in `RESUMED` to the next batch; median of 9 new loaders."""
    module = data(options)
    module.setup("test")
    found: dict[int, list[float]] = {step: [] for step in RESUMED}
    for _ in range(9):
        for step in RESUMED:
            loader = module.train_dataloader()
            epoch, batch = divmod(step, len(loader))
            state = loader.state_dict() | {"epoch": epoch, "row": batch * BATCH_SIZE}
            started = time.perf_counter()
            loader.load_state_dict(state)
            next(iter(loader))
            found[step].append(time.perf_counter() - started)
    return {str(step): statistics.median(seconds) for step, seconds in found.items()}


def resuming(found: dict[str, float]) -> list[str]:
    """Formats the results of `resume` as Markdown."""
    rows = [f"| {int(step):,} | {1000 * seconds:.1f} |" for step, seconds in found.items()]
    return ["| step | ms to the next batch |", "| ---: | ---: |", *rows]


def forget(path: Path) -> None:
    """Asks the kernel to drop a file's pages from the page cache, on systems that can."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(options: argparse.Namespace) -> dict[str, float]:
    """Bytes of text per second, without imports and loading the tokeniser."""
    import tempfile

    import numpy as np

    from lit_llm.data.tokenizer import load_tokenizer

    texts = json.loads((options.work / "texts.json").read_text())
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    tokenizer = load_tokenizer(options.work / "bpe-8192")
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        if options.one == WRITERS[0]:
            os.environ["LIT_LLM_CACHE"] = folder
            module = data(options)
            started = time.perf_counter()
            module.prepare_data()
        elif options.one == WRITERS[1]:
            from datasets import Dataset

            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # datasets.map parallelises by processes
            rows = Dataset.from_dict({"text": texts})
            started = time.perf_counter()
            mapped = rows.map(
                lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
                batched=True,
                num_proc=2,
                remove_columns="text",
                load_from_cache_file=False,
            )
            with (Path(folder) / "tokens").open("wb") as file:
                for batch in mapped.with_format("numpy").iter(1000):
                    file.write(np.concatenate(batch["ids"]).astype(np.uint16).tobytes())
        else:
            started = time.perf_counter()
            tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {"bytes": num_bytes / (time.perf_counter() - started)}


def columns(found: dict[str, list[dict[str, float]]], unit: str, scale: float) -> list[str]:
    """Formats a table with one row per method and one column per quantity."""
    states = list(next(iter(found.values()))[0])
    heads = [unit] if len(states) == 1 else [f"{state}, {unit}" for state in states]
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for name, results in found.items():
        values = [[result[state] / scale for result in results] for state in states]
        cells = [f"{statistics.median(v):.1f} [{min(v):.1f}–{max(v):.1f}]" for v in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
