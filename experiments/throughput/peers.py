"""Trains the GPT with one peer in this process: `python -m experiments.throughput.peers bare '{…a Setting…}'`.

`lit-llm fit` itself is not among them: run.py starts it as users do. All peers read the same rows in the same order,
with AdamW (6e-4, betas 0.9 and 0.95, weight decay 0.1), gradients clipped at a norm of 1, and no dropout.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.throughput.clock import Clock
from experiments.throughput.corpus import batches

ADAMW = {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


@dataclass(frozen=True)
class Setting:
    """What is trained, and for how long. `folder` has the corpus; `out` is the file for the clock's results."""

    folder: str
    out: str
    vocab_size: int = 65
    dtype: str = "bf16"
    num_layers: int = 6
    num_heads: int = 6
    d_model: int = 384
    seq_len: int = 256
    batch_size: int = 12
    steps: int = 20
    warmup: int = 5
    device: str = "cpu"
    compile: bool = False

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def network_options(self) -> dict[str, int]:
        names = ("d_model", "num_layers", "num_heads")
        return {"max_seq_len": self.seq_len} | {name: getattr(self, name) for name in names}

    def clock(self) -> Clock:
        return Clock(self.out, self.steps, self.warmup, self.tokens_per_step)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return batches(Path(self.folder), self.seq_len, self.batch_size, self.device)


def train(setting: Setting, network: torch.nn.Module, groups: Any, loss: Callable[..., torch.Tensor]) -> None:
    """Trains in a plain loop."""
    optimizer = torch.optim.AdamW(groups, **ADAMW, fused=True)
    clock = setting.clock()
    half = torch.autocast(setting.device, torch.bfloat16) if setting.dtype == "bf16" else contextlib.nullcontext()
    for ids, labels in itertools.islice(setting.batches(), setting.steps):
        with half:
            mean = loss(ids, labels)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick(mean, network)


def bare(setting: Setting) -> None:
    """The plain loop over this package's network, with the objective's own loss."""
    from functools import partial

    from lit_llm.models.gpt2 import GPT2
    from lit_llm.objectives.causal_lm import CausalLM
    from lit_llm.optimizers import parameter_groups

    torch.manual_seed(1337)
    objective = CausalLM(partial(GPT2, **setting.network_options()), vocab_size=setting.vocab_size)
    objective.configure_model()
    network = objective.network.to(setting.device).train()
    if setting.compile:
        from lit_llm.callbacks.compile import compile_blocks

        compile_blocks(network)

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total, targets = objective.loss({"input_ids": ids, "labels": labels})
        return total / targets

    train(setting, network, parameter_groups(network), loss)


def bare_keep(setting: Setting) -> None:
    """As `bare`, but keeps freed memory in the process like `lit-llm`, so only the cost of the framework differs."""
    from lit_llm.cli.allocator import keep_freed_memory

    keep_freed_memory()
    bare(setting)


def nanogpt(setting: Setting) -> None:
    """The plain loop over nanoGPT's network."""
    from experiments.throughput.nanogpt import NanoGPT

    torch.manual_seed(1337)
    network = NanoGPT(setting.vocab_size, **setting.network_options()).to(setting.device)
    forward = torch.compile(network) if setting.compile else network
    matrices, vectors = ([p for p in network.parameters() if (p.ndim < 2) == small] for small in (False, True))
    train(setting, network, [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], forward)


def hf(setting: Setting) -> None:
    """Hugging Face's Trainer with GPT2LMHeadModel and sdpa, which shifts the labels itself."""
    import numpy as np
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, logging

    logging.set_verbosity_error()
    torch.manual_seed(1337)
    clock = setting.clock()
    network = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=setting.vocab_size,
            n_positions=setting.seq_len,
            n_embd=setting.d_model,
            n_layer=setting.num_layers,
            n_head=setting.num_heads,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
            use_cache=False,
            attn_implementation="sdpa",
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    tokens = torch.from_numpy(np.load(Path(setting.folder) / "tokens.npy").astype(np.int64))
    count = (len(tokens) - 1) // setting.seq_len
    rows = tokens[: count * setting.seq_len].view(count, -1)[np.random.default_rng((0, 0)).permutation(count)]

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": rows[index], "labels": rows[index]}

    class Timed(Trainer):
        loss = torch.zeros(())

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            # One step is one micro-batch, so the previous step is complete when the next one starts.
            if self.state.global_step:
                clock.tick(self.loss, network)
            self.loss = super().training_step(*args, **kwargs)
            return self.loss

    arguments = TrainingArguments(
        str(Path(setting.out).with_suffix(".hf")),
        max_steps=setting.steps + 1,
        per_device_train_batch_size=setting.batch_size,
        learning_rate=ADAMW["lr"],
        adam_beta1=ADAMW["betas"][0],
        adam_beta2=ADAMW["betas"][1],
        weight_decay=ADAMW["weight_decay"],
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=setting.dtype == "bf16",
        use_cpu=setting.device == "cpu",
        torch_compile=setting.compile,
        train_sampling_strategy="sequential",  # `rows` are already in the order of the other peers
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Timed(network, arguments, train_dataset=Rows()).train()


def litgpt(setting: Setting) -> None:
    """`litgpt.pretrain.setup` as it is: LitGPT's GPT with rotary positions and tied head, its loop and its CSV logger.

    It always compiles; run.py sets TORCH_COMPILE_DISABLE=1 if the other peers do not.
    """
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule
    from torch.utils.data import DataLoader, IterableDataset

    clock = setting.clock()
    latest: dict[str, Any] = {}

    class Rows(IterableDataset):
        def __init__(self, steps: int, timed: bool) -> None:
            self.steps, self.timed = steps, timed

        def __iter__(self) -> Iterator[torch.Tensor]:
            for index, (ids, labels) in enumerate(setting.batches()):
                if index and self.timed:  # the previous step is complete when the next batch is requested
                    clock.tick(latest["loss"], latest["network"])
                if index == self.steps:
                    return
                yield torch.cat([ids, labels[:, -1:]], dim=1)

    class Data(DataModule):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(Rows(setting.steps, timed=True), batch_size=None)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(Rows(1, timed=False), batch_size=None)

    def remembering(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            latest["loss"] = loss(*args, **kwargs)
            return latest["loss"]

        return call

    def initialize(fabric: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        latest["network"] = model
        initialize_weights(fabric, model, **kwargs)

    initialize_weights, pretrain.initialize_weights = pretrain.initialize_weights, initialize
    pretrain.chunked_cross_entropy = remembering(pretrain.chunked_cross_entropy)
    pretrain.save_checkpoint = lambda *args: None  # it would parse the command line again
    pretrain.setup(
        "gpt",
        Config(
            name="gpt",
            block_size=setting.seq_len,
            vocab_size=setting.vocab_size,
            padded_vocab_size=setting.vocab_size,
            n_layer=setting.num_layers,
            n_head=setting.num_heads,
            n_embd=setting.d_model,
            parallel_residual=False,
            rotary_percentage=1.0,
            gelu_approximate="tanh",
        ),
        out_dir=Path(setting.out).with_suffix(".litgpt"),
        precision="bf16-mixed" if setting.dtype == "bf16" else "32-true",
        data=Data(),
        train=TrainArgs(
            save_interval=None,
            log_interval=10,
            global_batch_size=setting.batch_size,
            micro_batch_size=setting.batch_size,
            max_tokens=setting.steps * setting.tokens_per_step,
            max_norm=1.0,
            min_lr=ADAMW["lr"],
            lr_warmup_steps=0,
            tie_embeddings=True,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": dict(ADAMW)},
        devices=1,
        logger_name="csv",
    )


PEERS = {"bare": bare, "bare-keep": bare_keep, "nanogpt": nanogpt, "hf": hf, "litgpt": litgpt}

if __name__ == "__main__":
    PEERS[sys.argv[1]](Setting(**json.loads(sys.argv[2])))
