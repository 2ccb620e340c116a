"""A process killed between two micro-batches resumes exactly, with every optimiser and schedule."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback

import lit_llm.optimizers
import lit_llm.schedulers
from lit_llm.schedulers import Schedule
from tests.cli.test_resume import losses

ELSEWHERE = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}
"""From torch: the base class, one that calls a closure for losses, one for sparse gradients, one for matrices only."""


class Kill(Callback):
    """Kills the process without a chance to clean up."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def concrete(module: object, base: type) -> list[str]:
    found = (
        v for v in vars(module).values() if inspect.isclass(v) and issubclass(v, base) and not inspect.isabstract(v)
    )
    return sorted(f"{module.__name__}.{v.__name__}" for v in found if not v.__name__.startswith("_"))


OPTIMIZERS = concrete(lit_llm.optimizers, torch.optim.Optimizer)
OPTIMIZERS = [name for name in OPTIMIZERS if not name.endswith((".Optimizer", ".AdamW"))] + [
    name for name in concrete(torch.optim, torch.optim.Optimizer) if name.rsplit(".")[-1] not in ELSEWHERE
]
SCHEDULES = concrete(lit_llm.schedulers, Schedule)

# One process imports everything by a first run, and then forks for each run.
FORKS = """
import json, os, sys
from lit_llm.cli import main
runs, speak = json.loads(sys.stdin.read()), sys.stdout
sys.stdout = open(os.devnull, "w")
main([*runs[0][:-1], runs[0][-1] + "-first"])
sys.stdout = speak
for words in runs:
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        main(words)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_run_killed_between_micro_batches_has_the_losses_of_one_never_killed(tiny, tmp_path):
    pairs = list(zip(OPTIMIZERS, itertools.cycle(SCHEDULES)))
    assert len(pairs) >= max(10, len(SCHEDULES))
    runs = []
    for optimizer, schedule in pairs:
        words = ["fit", *map(str, tiny)]
        flags = {
            "model.optimizer": optimizer,
            "model.optimizer.lr": 0.01,
            "model.schedule": schedule,
            "model.schedule.warmup_steps": 3,
            "trainer.max_steps": 12,
            "trainer.accumulate_grad_batches": 3,
            "trainer.log_every_n_steps": 1,
            "trainer.val_check_interval": 36,
            "checkpoint.every_n_steps": 5,
            "test_after_fit": "false",
        }
        words += [f"--{name}={value}" for name, value in flags.items()]
        name = optimizer.rsplit(".")[-1]
        killed = ["--trainer.callbacks+=tests.cli.test_killed.Kill", "--trainer.callbacks.batch=25"]
        runs += [
            [*words, f"--run_dir={tmp_path / name / 'whole'}"],
            [*words, f"--run_dir={tmp_path / name / 'cut'}", *killed],
            [*words, f"--run_dir={tmp_path / name / 'cut'}", "--ckpt_path=last"],
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command, given = [sys.executable, "-c", FORKS], json.dumps(runs)
    codes = subprocess.run(command, input=given, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert codes.split() == ["0", "-9", "0"] * len(pairs)
    for optimizer, _ in pairs:
        whole, cut = (losses(tmp_path / optimizer.rsplit(".")[-1] / run) for run in ("whole", "cut"))
        assert sorted(whole) == list(range(1, 13))
        assert cut == whole, optimizer
