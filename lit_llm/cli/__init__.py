"""The command `lit-llm`: runs the sub-command and reports a user's mistake in one line.

Nothing heavy is imported before the sub-command is known, so `--help` and `--version` answer at once.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from lit_llm import __version__
from lit_llm.cli.lean_import import import_torchmetrics
from lit_llm.cli.quiet import quieten
from lit_llm.wording import did_you_mean

COMMANDS = {
    "fit": ("lit_llm.cli.training", "train a network: pre-training or fine-tuning"),
    "validate": ("lit_llm.cli.training", "evaluate a checkpoint on the validation split"),
    "test": ("lit_llm.cli.training", "evaluate a checkpoint on the test split"),
    "predict": ("lit_llm.cli.training", "write a checkpoint's predictions to a table"),
    "plan": ("lit_llm.cli.plan", "estimate what a run will need: memory, time, energy, cost"),
    "generate": ("lit_llm.cli.generate", "continue prompts with a trained language model"),
    "serve": ("lit_llm.cli.serve", "serve a trained model over HTTP"),
    "evaluate": ("lit_llm.cli.evaluate", "score a language model on lm-eval tasks"),
    "compress": ("lit_llm.cli.compress", "make a trained model smaller and faster, and report the cost"),
    "export": ("lit_llm.cli.export", "export a trained network to one file for serving: ONNX, torch.export"),
    "sweep": ("lit_llm.cli.sweep", "run a W&B sweep file on this machine"),
    "compare": ("lit_llm.cli.compare", "compare runs: mean and spread over seeds, tests, curves"),
    "tokenizer": ("lit_llm.cli.tokenizer", "train a tokeniser on a corpus"),
}

HELP = f"""usage: lit-llm COMMAND [options]

Build large models from scratch: raw data, architecture, pre-training, fine-tuning, evaluation, compression.

commands:
{chr(10).join(f"  {name:<11}{text}" for name, (_, text) in COMMANDS.items())}

examples:
  lit-llm fit --config configs/pretraining/llama_stdlib.yaml
  lit-llm fit --config configs/pretraining/llama_stdlib.yaml --data.path my_texts/ --trainer.max_steps 200
  lit-llm fit --run_dir runs/llama_stdlib/2026-01-31_12-00-00 --ckpt_path last    # resume
  lit-llm generate --model runs/llama_stdlib/2026-01-31_12-00-00/model --prompt "def main("

options:
  -h, --help     show this help; `lit-llm COMMAND --help` explains a command
  --version      print the version

LIT_LLM_TRACEBACK=1 shows the traceback of an error.
LIT_LLM_CACHE=DIR moves all caches (tokens, images, tables, tokenisers, teachers' outputs) from ~/.cache/lit-llm.
"""

STOPPED = "Stopped: run the same command again to resume."
"""What is said after Ctrl-C by a command that trains more than once."""


def main(args: list[str] | None = None) -> None:
    """Runs a command line.

    Args:
        args: The arguments after `lit-llm`; `None` uses those of the process.

    Raises:
        SystemExit: With code 2 after a user's mistake, which is reported in one line; with 130 after Ctrl-C.
    """
    if args is not None:
        sys.argv = [sys.argv[0], *args]
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if words[0] == "--version":
        print(f"lit-llm {__version__}")
        return
    if words[0] not in COMMANDS:
        remedy = did_you_mean(words[0], COMMANDS) or "; see lit-llm --help"
        fail(f"command must be one of {', '.join(COMMANDS)}, but is {words[0]}{remedy}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # classes of the working directory can be named in configs
    try:
        import_torchmetrics()  # takes seconds: inside the try, so that Ctrl-C is handled
        quieten()
        module = importlib.import_module(COMMANDS[words[0]][0])
        with _speaking():
            module.run(words)
    except KeyboardInterrupt:
        if words[0] in ("sweep", "compress"):
            print(STOPPED, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from lit_llm.cli.errors import one_line

        line = one_line(error)
        if line is None or os.environ.get("LIT_LLM_TRACEBACK"):
            raise
        fail(line)


def fail(line: str) -> NoReturn:
    """Prints a user's mistake and exits with code 2."""
    print(f"lit-llm: error: {line}", file=sys.stderr)
    sys.exit(2)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _speaking() -> Iterator[None]:
    """Prints the package's own log lines to standard error while the command runs, in local rank 0 only."""
    logger, lines = logging.getLogger("lit_llm"), _Lines()
    if logger.handlers or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
        yield
        return
    level, propagate = logger.level, logger.propagate
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
        logger.propagate = propagate
