"""`lit-llm evaluate`: scores a language model on tasks of lm-eval (EleutherAI's evaluation harness)."""

from __future__ import annotations

import argparse
import json as json_format
from pathlib import Path
from typing import Any

from lit_llm.cli.parser import OneLineArguments, moved, require_writable
from lit_llm.files import write_json
from lit_llm.ranges import require_at_least
from lit_llm.wording import first_line, needing


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    options = _parser().parse_args(words[1:])
    require_at_least(1, "--", batch_size=options.batch_size, limit=options.limit)
    require_at_least(0, "--", num_fewshot=options.num_fewshot)
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
        ImportError: When lm-eval is not installed.
        FileNotFoundError: When a task file does not exist.
        ValueError: When the model is not a causal language model or has no tokeniser, or a task is neither known nor a
            file, or cannot be loaded.
    """
    with needing("lm-eval", "evaluation", "for lit-llm evaluate"):
        import lm_eval
    from lit_llm.checkpoints import load_language_model
    from lit_llm.harness import GivenTasks, LiveModel

    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--tasks must be names or files, but {file} does not exist")
    known = GivenTasks(include_defaults=len(files) < len(tasks))
    for task in tasks:
        if task not in files and task not in known.all_tasks:
            raise ValueError(f"--tasks must be tasks of lm-eval or YAML files, but {task} is neither")
    known.files = {file: _read_task(file) for file in files}
    network, tokenizer = load_language_model(model)
    live = LiveModel(moved(network, device), tokenizer, batch_size)
    results = lm_eval.simple_evaluate(
        live,
        tasks=[known.files.get(task, task) for task in tasks],
        limit=limit,
        num_fewshot=num_fewshot,
        task_manager=known,
        bootstrap_iters=1000,
    )["results"]
    if json is not None:
        write_json(json, json_format.loads(json_format.dumps(results, default=str)))
    return results


def _read_task(path: str) -> dict[str, Any]:
    """Reads a task file with lm-eval's own loader, which resolves includes and `!function` tags."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(path)
    except (yaml.YAMLError, ValueError, OSError, ImportError, AttributeError) as error:
        raise ValueError(f"--tasks must be YAML files of lm-eval, but {path} is none: {first_line(error)}") from error
