"""`lit-llm evaluate`: a language model's scores at the tasks of lm-eval, the field's harness."""

from __future__ import annotations

import argparse
import json as json_format
import re
from pathlib import Path
from typing import Any

from lit_llm.cli import fail
from lit_llm.cli.parser import OneLineArguments, moved, require_writable
from lit_llm.files import write_json
from lit_llm.wording import first_line

NEW_TOKENS = 256
"""Most tokens of an answer where its task says nothing, as in lm-eval's own models."""


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    options = _parser().parse_args(words[1:])
    for name in ("batch_size", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            fail(f"--{name} must be at least 1, but is {value}")
    require_writable(options.json)
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
        description="Score a language model on lm-eval tasks (pip install 'lit-llm[evaluation]'). A task is the name "
        "of one of the harness's own tasks, which may download data, or a YAML file of yours, which need not.",
        epilog="example: lit-llm evaluate --model runs/llama_stdlib/<time>/model --tasks my_task.yaml hellaswag",
    )
    parser.add_argument("--model", required=True, help="a model directory, a run folder or a checkpoint file")
    parser.add_argument("--tasks", required=True, nargs="+", help="names of tasks, or YAML files")
    parser.add_argument("--limit", type=int, help="evaluate only this many examples of each task")
    parser.add_argument("--num_fewshot", type=int, help="number of few-shot examples (default: the task's)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per batch (default 8)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …; default: the accelerator if there is one")
    parser.add_argument("--json", type=Path, help="write the scores to this file")
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
    from lit_llm.checkpoints import load_language_model

    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--tasks must be names or files, but {file} does not exist")
    known = TaskManager(include_defaults=len(files) < len(tasks))  # thousands of files, which take seconds to read
    for task in tasks:
        if task not in files and task not in known.all_tasks:
            raise ValueError(f"--tasks must be tasks of lm-eval or YAML files, but {task} is neither")
    given = [_read_task(task) if task in files else task for task in tasks]
    network, tokenizer = load_language_model(model)
    adapter = adapted(moved(network, device), tokenizer, batch_size)
    results = lm_eval.simple_evaluate(
        adapter, tasks=given, limit=limit, num_fewshot=num_fewshot, task_manager=known, bootstrap_iters=1000
    )["results"]
    if json is not None:
        write_json(json, json_format.loads(json_format.dumps(results, default=str)))
    return results


def _read_task(path: str) -> dict[str, Any]:
    """A task's file, with what it includes, and its functions, as lm-eval reads one."""
    import yaml

    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError:  # before version 0.4.10
        from lm_eval.utils import load_yaml_config as load_yaml
    try:
        return load_yaml(path)
    except (yaml.YAMLError, ValueError, OSError, ImportError, AttributeError) as error:
        raise ValueError(f"--tasks must be YAML files of lm-eval, but {path} is none: {first_line(error)}") from error


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
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from lit_llm.data.tokenizer import boundary_id, first_id, opening_ids
    from lit_llm.generation import steps

    longest = getattr(network, "max_seq_len", None) or 2048
    place = next(network.parameters()).device
    opening = opening_ids(tokenizer)
    # Where the head is apart, there are logits only of what is asked.
    read, head = (network.hidden, network.lm_head) if hasattr(network, "hidden") else (network, torch.nn.Identity())

    class LiveModel(TemplateLM):
        """The harness's view of the network."""

        eot_token_id = boundary_id(tokenizer)
        prefix_token_id = first_id(tokenizer)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            """Tokens of a text, after what opens one, unless it is there or not wanted; no mark is added at the end."""
            ids = tokenizer.encode(string, add_special_tokens=False)
            return ids if add_special_tokens is False or ids[:1] == opening else [*opening, *ids]

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
                for i, row in zip(batch, read(ids.to(place)), strict=True):
                    tokens, count = rows[i]
                    count = min(count, len(tokens) - 1)
                    said = head(row[len(tokens) - 1 - count : len(tokens) - 1]).float().log_softmax(dim=-1)
                    target = torch.tensor(tokens[len(tokens) - count :], device=place)
                    nats = said.gather(1, target[:, None]).sum()
                    found[i] = float(nats), bool((said.argmax(dim=-1) == target).all())
            return [found[index] for index in range(len(rows))]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Log-probability of whole texts, window by window."""
            totals = []
            for request in requests:
                tokens = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = map(make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, longest, 1))
                pairs = [(("", ""), list(context), list(wanted)) for context, wanted in windows]
                totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs)))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """The continuations, the likeliest where a task does not want them drawn, up to a stop."""
            ways: dict[tuple[Any, ...], list[int]] = {}
            for index, request in enumerate(requests):
                options = normalize_gen_kwargs(request.args[1], NEW_TOKENS)
                new = min(options["max_gen_toks"], longest - 1)  # the context gives way, as in lm-eval's own
                temperature = options.get("temperature", 1.0) if options.get("do_sample") else 0.0
                until = options.get("until") or []
                stops = filter(None, [until] if isinstance(until, str) else until)
                drawn = float(temperature), options.get("top_k"), options.get("top_p")
                ways.setdefault((new, tuple(stops), *drawn), []).append(index)
            texts: dict[int, str] = {}
            for way, members in ways.items():
                room = longest - way[0]
                first = [] if opening else [self.prefix_token_id]
                ids = {i: [*first, *self.tok_encode(requests[i].args[0])][-room:] for i in members}
                order = sorted(members, key=lambda index: len(ids[index]))
                for first in range(0, len(order), batch_size):
                    batch = order[first : first + batch_size]
                    said = self._written([ids[index] for index in batch], *way, seed=first)
                    texts |= dict(zip(batch, said, strict=True))
            return [texts[index] for index in range(len(requests))]

        def _written(
            self, prompts: list[list[int]], new: int, stops: tuple[str, ...], *drawn: Any, seed: int
        ) -> list[str]:
            """What is written after each prompt, up to the first stop in it."""
            ends = re.compile("|".join(map(re.escape, stops)) or "(?!)").search
            said: list[list[int]] = [[] for _ in prompts]
            made = steps(network, prompts, new, *drawn, seed=seed, stop=self.eot_token_id)
            for count, tokens in enumerate(made, 1):
                for text, token in zip(said, tokens, strict=True):
                    text += [token] if token is not None else []
                over = (token is None or ends(tokenizer.decode(text)) for text, token in zip(said, tokens, strict=True))
                if count % 8 == 0 and all(over):
                    break  # all that comes would be cut
            texts = tokenizer.batch_decode(said, skip_special_tokens=True)
            return [text[: found.start()] if (found := ends(text)) else text for text in texts]

    return LiveModel()
