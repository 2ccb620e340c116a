"""Useful tokens per second of training on packed rows, and on rows padded to a fixed length or to the longest row.

    OMP_NUM_THREADS=2 python -m experiments.instruction_packing.packing

All three read the same conversations with the same objective, network and optimiser, and the same budget of tokens per
batch, including padding. Useful tokens are those of conversations. The three alternate, so that a slower machine slows
all of them; each figure is a median over steps.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.throughput.report import write_table
from lit_llm.batch import IGNORE_INDEX
from lit_llm.data.instructions import Examples, InstructionData
from lit_llm.models.llama import Llama
from lit_llm.objectives.causal_lm import CausalLM

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--path", default="stdlib-instructions")
parser.add_argument("--tokenizer", default="bpe-2048")
parser.add_argument("--seq_len", type=int, default=256)
parser.add_argument("--tokens", type=int, default=4096, help="budget of a batch")
parser.add_argument("--d_model", type=int, default=256)
parser.add_argument("--num_layers", type=int, default=3)
parser.add_argument("--steps", type=int, default=30, help="steps of each kind that count")
parser.add_argument("--device", default="cpu")
readme = Path(__file__).with_name("README.md")
parser.add_argument("--readme", type=Path, default=readme, help="what the table is written into")
options = parser.parse_args()
PADDING, WARM_UP, GOAL = 0, 3, 3.0


def opened(packed: bool) -> InstructionData:
    data = InstructionData(
        options.path, tokenizer=options.tokenizer, seq_len=options.seq_len, batch_size=1, packed=packed
    )
    data.prepare_data()
    data.setup("fit")
    return data


def batches(examples: Examples, width: int | None) -> list[tuple[dict[str, Tensor], int]]:
    """Batches that fill the budget, padded to `width` or to their longest row, with their numbers of useful tokens."""
    made, rows, longest = [], [], 0
    for row in np.random.default_rng(0).permutation(examples.num_rows).tolist():
        length = width or int(examples.lengths[examples.held(row)].sum())
        if max(longest, length) * (len(rows) + 1) > options.tokens:
            batch = dict(examples.batch(np.array(rows), PADDING, with_bytes=False, with_documents=False))
            if width and (more := width - batch["input_ids"].shape[1]):
                batch["input_ids"] = F.pad(batch["input_ids"], (0, more), value=PADDING)
                batch["labels"] = F.pad(batch["labels"], (0, more), value=IGNORE_INDEX)
            useful = sum(int(examples.lengths[examples.held(r)].sum()) for r in rows)
            made.append(({name: value.to(options.device) for name, value in batch.items()}, useful))
            rows, longest = [], 0
            if len(made) == options.steps + WARM_UP:
                break
        rows.append(row)
        longest = max(longest, length)
    return made


packed, unpacked = opened(packed=True), opened(packed=False)
kinds = {
    f"padded to {options.seq_len} tokens": batches(unpacked.examples("train"), options.seq_len),
    "padded to the longest of the batch": batches(unpacked.examples("train"), None),
    f"packed into {options.seq_len} tokens": batches(packed.examples("train"), options.seq_len),
}

torch.manual_seed(0)
objective = CausalLM(Llama, vocab_size=packed.vocab_size)
objective.network = Llama(
    packed.vocab_size,
    d_model=options.d_model,
    num_layers=options.num_layers,
    num_heads=4,
    max_seq_len=options.seq_len,
    qk_norm=True,
).to(options.device)
optimizer = torch.optim.AdamW(objective.network.parameters(), lr=1e-3)


def wait() -> float:
    if options.device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def step(batch: dict[str, Tensor]) -> float:
    started = wait()
    with torch.autocast(options.device, dtype=torch.bfloat16):
        loss, targets = objective.loss(batch)
    (loss / targets).backward()
    optimizer.step()
    optimizer.zero_grad()
    return wait() - started


rates: dict[str, list[float]] = {name: [] for name in kinds}
for number in range(options.steps + WARM_UP):
    for name, made in kinds.items():
        batch, useful = made[number % len(made)]
        seconds = step(batch)
        if number >= WARM_UP:
            rates[name].append(useful / seconds)

lines = [
    "| rows | useful of all tokens | useful tokens a second | ratio | goal |",
    "| --- | ---: | ---: | ---: | ---: |",
]
plain = statistics.median(next(iter(rates.values())))
for name, made in kinds.items():
    part = sum(useful for _, useful in made) / sum(batch["input_ids"].numel() for batch, _ in made)
    rate = statistics.median(rates[name])
    judged = f"{GOAL:.2f} {'met' if rate >= GOAL * plain else '**missed**'}" if name.startswith("packed") else ""
    lines.append(f"| {name} | {100 * part:.0f} % | {rate:,.0f} | {rate / plain:.2f} | {judged} |")
write_table("packing", lines, options.readme)
