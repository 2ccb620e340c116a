"""`lit-llm evaluate`: a language model's scores at the tasks of lm-eval, the field's harness."""

from __future__ import annotations

import argparse
import json as json_format
from pathlib import Path
from typing import Any

from lit_llm.cli import fail
from lit_llm.cli.parser import OneLineArguments


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    options = _parser().parse_args(words[1:])
    if options.batch_size < 1:
        fail(f"--batch_size must be at least 1, but is {options.batch_size}")
    results = evaluate(**vars(options))
    for task, found in results.items():
        for name, value in found.items():
            if isinstance(value, float) and "stderr" not in name:
                metric, _, how = name.partition(",")
                error = found.get(f"{metric}_stderr,{how}")
                print(f"{task:<24}{metric:<24}{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineArguments(
        prog="lit-llm evaluate",
        description="Score a language model at the tasks of lm-eval (pip install 'lit-llm[evaluation]'). A task is one "
        "that the harness knows by name, which may download its data, or a YAML file of your own, which need not.",
        epilog="example: lit-llm evaluate --model runs/llama_stdlib/<time>/model --tasks my_task.yaml hellaswag",
    )
    parser.add_argument("--model", required=True, help="a model directory, a run folder or a checkpoint file")
    parser.add_argument("--tasks", required=True, nargs="+", help="names, or YAML files")
    parser.add_argument("--limit", type=int, help="only the first examples of each task")
    parser.add_argument("--num_fewshot", type=int, help="solved examples shown before each (default: the task's)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows read at once (default 8)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …; by default the accelerator, if there is one")
    parser.add_argument("--json", type=Path, help="file to write the scores to")
    return parser


def evaluate(
    model: str,
    tasks: list[str],
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    device: str,
    json: Path | None,
) -> dict[str, dict[str, Any]]:
    """Scores a model; arguments as in `lit-llm evaluate --help`.

    Returns:
        The harness's metrics of each task.

    Raises:
        ModuleNotFoundError: When lm-eval is not installed.
        ValueError: When the model continues no texts or has no tokeniser, or a task is neither known nor a file.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "package lm-eval must be installed for lit-llm evaluate, but is not; pip install 'lit-llm[evaluation]'"
        ) from error
    import torch
    import yaml

    from lit_llm.checkpoints import load_language_model

    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--tasks must be names or files, but {file} does not exist")
    known = TaskManager(include_defaults=len(files) < len(tasks))  # thousands of files, which take seconds to read
    for task in tasks:
        if task not in files and task not in known.all_tasks:
            raise ValueError(f"--tasks must be tasks of lm-eval or YAML files, but {task} is neither")
    given = [yaml.safe_load(Path(task).read_text(encoding="utf-8")) if task in files else task for task in tasks]
    network, tokenizer = load_language_model(model)
    if device == "auto":
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    adapter = adapted(network.to(torch.device(device)), tokenizer, batch_size)
    results = lm_eval.simple_evaluate(
        adapter, tasks=given, limit=limit, num_fewshot=num_fewshot, task_manager=known, bootstrap_iters=1000
    )["results"]
    if json is not None:
        _write(json, results)
    return results


def _write(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json_format.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")


def adapted(network: Any, tokenizer: Any, batch_size: int = 8) -> Any:
    """What lm-eval asks, answered by the live network itself: no copy, no transformers class between.

    Args:
        network: A causal language model, with `new_cache` where tasks have it write.
        tokenizer: Its tokeniser.
        batch_size: Rows read at once.

    Source:
        Gao et al., 2021, "A Framework for Few-shot Language Model Evaluation", doi:10.5281/zenodo.5371628.
    """
    import torch
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from lit_llm.data.tokenizer import boundary_id
    from lit_llm.generation import generate

    longest = getattr(network, "max_seq_len", None) or 2048
    place = next(network.parameters()).device

    class LiveModel(TemplateLM):
        """The harness's view of the network."""

        eot_token_id = boundary_id(tokenizer)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            """Tokens of a text, without marks."""
            return tokenizer.encode(string, add_special_tokens=False)

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            rows = [((context + wanted)[-longest - 1 :], len(wanted)) for _, context, wanted in requests]
            order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
            found: dict[int, tuple[float, bool]] = {}
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                width = len(rows[batch[0]][0]) - 1
                # Padding stands on the right, where a causal network does not look.
                ids = torch.tensor([[*rows[i][0][:-1], *[0] * (width - len(rows[i][0]) + 1)] for i in batch])
                logits = network(ids.to(place)).float()
                for i, row in zip(batch, logits, strict=True):
                    tokens, count = rows[i]
                    count = min(count, len(tokens) - 1)
                    said = row[len(tokens) - 1 - count : len(tokens) - 1].log_softmax(dim=-1)
                    target = torch.tensor(tokens[len(tokens) - count :], device=place)
                    nats = said.gather(1, target[:, None]).sum()
                    found[i] = float(nats), bool((said.argmax(dim=-1) == target).all())
            return [found[index] for index in range(len(rows))]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Log-probability of whole texts, window by window."""
            totals = []
            for request in requests:
                tokens = self.tok_encode(request.args[0])
                windows = map(make_disjoint_window, get_rolling_token_windows(tokens, self.eot_token_id, longest, 1))
                pairs = [(("", ""), list(context), list(wanted)) for context, wanted in windows]
                totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs)))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """The likeliest continuations, up to a stop."""
            texts = []
            for request in requests:
                prompt, options = request.args
                new = min(options.get("max_gen_toks", 128), longest // 2)
                ids = [self.eot_token_id, *self.tok_encode(prompt)][-(longest - new) :]
                said = generate(network, [ids], new, temperature=0.0, stop=self.eot_token_id)[0]
                text = tokenizer.decode(said, skip_special_tokens=True)
                until = options.get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                texts.append(text)
            return texts

    return LiveModel()
