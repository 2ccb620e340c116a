"""`lit-llm plan`: estimates what a run will need from its config alone."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lit_llm.cli import fail
from lit_llm.cli.parser import OneLineArguments, require_writable
from lit_llm.cli.plan_report import report
from lit_llm.files import write_json

TABLE = (8, 16, 32, 64, 128, 256, 512, 1024)
PROBE_STEPS = 20
UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "b": 1}


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    options, more = _parser().parse_known_args(words[1:])
    if options.devices < 1 or options.nodes < 1:
        fail(f"--devices and --nodes must be at least 1, but are {options.devices} and {options.nodes}")
    if options.tokens is not None and not 0 < options.tokens < math.inf:
        fail(f"--tokens must be finite and above 0, but is {options.tokens:g}")
    if options.probe is not None and options.probe < 2:
        fail(f"--probe must be at least 2 steps, but is {options.probe}")
    require_writable(options.json)
    found = plan(options, more)
    print("\n".join(report(found)))
    if options.json:
        write_json(options.json, found)


def size(text: str) -> float:
    """Parses a number of bytes with a unit, such as 80GiB or 24GB.

    Example:
        >>> size("1.5KiB")
        1536.0
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?((?:[kmgt]i?)?b)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"size must be a number of bytes with a unit, as 80GiB, but is {text}")
    return float(match[1]) * UNITS[match[2]]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineArguments(
        prog="lit-llm plan",
        description="Estimate what a run will need: parameters, operations, memory under each strategy, time, energy, "
        "cost. The training step of the config is run on tensors without storage: no weights are allocated, and no "
        "data are read for a language model (an epoch of other texts, a single batch of images). Only --data.tokenizer "
        "characters has to read them to count its tokens, unless --model.vocab_size gives their number. All other "
        "options, such as --model.network or --data.seq_len, are those of lit-llm fit; precision auto is planned as "
        "bf16-mixed, with --probe as what it is on this machine.",
        epilog="example: lit-llm plan --config configs/pretraining/llama_stdlib.yaml --model.network "
        "configs/models/llama3_8b.yaml --model.vocab_size 128256 --data.seq_len 8192 --data.batch_size 1 --devices 8 "
        "--table",
    )
    parser.add_argument("--devices", type=int, default=1, help="devices per node (default 1)")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (default 1)")
    parser.add_argument("--memory", type=size, default="80GiB", help="memory per device (default 80GiB)")
    parser.add_argument("--peak_flops", type=float, default=989e12, help="peak FLOP/s of a device (default: an H100)")
    parser.add_argument("--mfu", type=float, default=0.4, help="fraction of the peak that is reached (default 0.4)")
    parser.add_argument("--watts", type=float, default=700.0, help="power of a device (default: an H100, 700)")
    parser.add_argument(
        "--bandwidth", type=size, default="50GB", help="bytes per second sent by a device (default 50GB)"
    )
    parser.add_argument("--price", type=float, help="price of a device per hour, in your currency")
    parser.add_argument(
        "--tokens",
        type=float,
        help="training tokens, or examples (default: 20 per parameter of a language model trained from scratch, else "
        "what the config's max_steps and max_epochs come to)",
    )
    parser.add_argument("--table", action="store_true", help="also plan for 8 to 1,024 devices")
    parser.add_argument(
        "--probe",
        type=int,
        nargs="?",
        const=PROBE_STEPS,
        metavar="STEPS",
        help=f"time this many real steps on this machine (default {PROBE_STEPS}) and plan with their speed",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def plan(options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Computes the plan; if a step depends on the contents of tensors, not only on shapes, only what a probe measures.

    Args:
        options: As in `lit-llm plan --help`.
        words: Arguments of `lit-llm fit`.

    Raises:
        ValueError: When a value is out of range, or a step depends on contents and `--probe` is not given.
    """
    from lit_llm.dry_run import NeedsContent
    from lit_llm.planning import OPTIMAL_TOKENS_PER_PARAMETER, PAIR, STRATEGIES, Machine, bill, memory, traffic

    machine = Machine(options.memory, options.peak_flops, options.mfu, options.watts, options.bandwidth, options.price)
    devices = options.devices * options.nodes
    try:
        steps, details = measured_steps(words, devices, options.probe is not None)
    except NeedsContent:
        if not options.probe:
            raise
        return {"probe": probe(words, None, options.probe)}
    plain = next(iter(steps.values()))
    flops = details["flops_per_token"]
    found: dict[str, Any] = details | {
        "steps": {name: asdict(step) | {"peak": step.peak} for name, step in steps.items()}
    }
    if options.probe:
        found["probe"] = probe(words, details, options.probe)
        machine = replace(machine, peak_flops=found["probe"]["flops_per_second"], mfu=1.0)  # measured, not assumed
    parts, mean = details["accumulate_grad_batches"], details["tokens_per_batch"]
    optimal = OPTIMAL_TOKENS_PER_PARAMETER * plain.parameters if details["is_new_language_model"] else None
    step = mean * parts * devices
    configured = min(details["max_steps"] * step, details["max_batches"] * mean)
    lengths = {"option": options.tokens, "rule": optimal, "config": configured, "step": step}
    origin, tokens = next((name, length) for name, length in lengths.items() if length and length < math.inf)

    def billed(strategy: str, devices: int, share: float = 1.0) -> Any:
        sent = traffic(replace(plain, parts=math.ceil(parts * share)), strategy, devices)
        return bill(flops, mean * parts * share, sent, tokens, machine, devices)

    del found["max_steps"], found["max_batches"]
    found |= {"devices": devices, "tokens": tokens, "tokens_from": origin, "optimal_tokens": optimal}
    found["machine"] = asdict(machine)
    sharing = dict.fromkeys(STRATEGIES, devices) | {"tensor_parallel": options.devices}  # within a node
    if options.devices % PAIR:
        del sharing["fsdp_tensor_parallel"]
    found["memory"] = {
        name: {strategy: asdict(memory(step, strategy, count)) for strategy, count in sharing.items()}
        for name, step in steps.items()
    }
    found["bill"] = asdict(billed("fsdp", devices))
    if options.table:
        rows = TABLE[0] * details["batch_size"] * parts
        found["table"] = {
            count: {
                "memory": memory(plain, "fsdp", count).peak,
                "memory_checkpointed": memory(list(steps.values())[-1], "fsdp", count).peak,
                **asdict(billed("fsdp", count)),
                "strong_efficiency": billed("fsdp", count, TABLE[0] / count).efficiency if rows >= count else None,
            }
            for count in TABLE
        }
    return found


def measured_steps(words: list[str], devices: int, is_here: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures a config's training step: as configured and, if the network can, with activation checkpointing.

    Args:
        words: Arguments of `lit-llm fit`.
        devices: Number of devices that the run is planned for.
        is_here: Whether these are like this machine's, so that the precision `auto` is what it is here.

    Returns:
        The steps by name, and further facts of the config.
    """
    import torch
    from lightning.fabric.connector import _convert_precision_to_unified_args

    from lit_llm.callbacks.weight_average import WeightAverage
    from lit_llm.cli import training
    from lit_llm.cli.standard_parts import listed
    from lit_llm.cli.trainer import suited_precision
    from lit_llm.dry_run import NeedsContent, measure_step
    from lit_llm.recipes import built

    cli = training.read_run(words)
    objective, data, trainer = cli.model, cli.datamodule, cli.config["fit"]["trainer"]
    given = trainer["precision"]
    if given == "auto":
        given = suited_precision(trainer["accelerator"]) if is_here else "bf16-mixed"
    precision = _convert_precision_to_unified_args(given) or "32-true"
    if precision.startswith("transformer-engine"):
        raise NeedsContent(
            f"trainer.precision must be one that torch has itself to be planned, but is {precision}; measure it with "
            f"--probe"
        )
    callbacks = listed(cli.config_init["fit"]["trainer"]["callbacks"])
    averages = objective.averages or any(isinstance(c, WeightAverage) for c in callbacks)
    (batch, mean), parts = example_batch(objective, data), trainer["accumulate_grad_batches"] or 1

    weights = objective.hparams.get("weights")  # the objective drops them after loading

    def build() -> Any:
        objective.network, objective.hparams["weights"] = None, weights
        for name, own in objective.named_buffers(recurse=False):  # were allocated outside of the dry run
            setattr(objective, name, torch.empty(own.shape, dtype=own.dtype))
        objective.configure_model()
        return objective.network.train()

    def loss(network: Any, batch: Any) -> Any:
        try:
            total, targets = objective.planned_loss(batch)
        except RuntimeError as error:
            if "is not attached to a `Trainer`" not in str(error):
                raise
            raise NeedsContent(
                f"model must have a loss that needs shapes alone to be planned, but is a {type(objective).__name__}; "
                f"measure it with --probe"
            ) from error
        return total / targets.clamp(min=1)

    def taken(checkpointed: bool | None = None) -> Any:
        step = measure_step(build, lambda _: objective.new_optimizer(), loss, batch, precision, checkpointed, parts)
        return replace(step, average=step.weights) if averages else step

    steps = {"as configured": taken()}
    network = objective.network
    if getattr(network, "activation_checkpointing", None) is False:
        recipe = objective.hparams["network"]
        if objective.make_network is not None and "activation_checkpointing" in recipe.get("init_args", {}):
            again = {**recipe, "init_args": {**recipe["init_args"], "activation_checkpointing": True}}
            objective.make_network = lambda size: built(again, Path("."), size)
        steps["with activation checkpointing"] = taken(True)
    rule = getattr(network, "flops_per_token", None) if "input_ids" in batch else None
    step = steps["as configured"]
    max_steps, max_batches = configured_length(trainer, objective.planned_for, devices)
    return steps, {
        "is_new_language_model": objective.size_name == "vocab_size"
        and step.trained == step.parameters
        and weights is None,
        "max_steps": max_steps,
        "max_batches": max_batches,
        "network": type(network).__name__,
        "averages": averages,
        "precision": precision,
        "batch_size": len(next(iter(batch.values()))),
        "seq_len": batch["input_ids"].shape[1] if "input_ids" in batch else None,
        "tokens_per_batch": mean,
        "accumulate_grad_batches": parts,
        "flops_per_token": rule(batch["input_ids"].shape[1]) if rule else step.flops / step.tokens,
    }


def configured_length(trainer: Any, data: Any, devices: int) -> tuple[int | float, int | float]:
    """Steps, and batches of all devices, after which a config ends a run; infinite if unlimited or unknown.

    Args:
        trainer: The trainer's options.
        data: The data module, set up, so that the batches of an epoch can be counted; `None` if it is not.
        devices: Number of devices that share those batches; a whole `limit_train_batches` is the number for each.
    """
    steps, epochs = trainer["max_steps"], trainer["max_epochs"]
    batches, limit = math.inf, trainer.get("limit_train_batches")
    if data is not None and epochs not in (None, -1):
        with contextlib.suppress(TypeError):  # a stream has no length
            batches = len(data.train_dataloader())
        if limit is not None:
            batches = min(batches, limit * devices) if isinstance(limit, int) else batches * limit
        batches *= epochs
    return math.inf if steps in (None, -1) else steps, batches


def example_batch(objective: Any, data: Any) -> tuple[dict[str, Any], int | float]:
    """A batch in the shapes of a config, and the mean number of tokens (or rows) per batch.

    For a language model the batch is zeros, so that no text is read; otherwise it is that of `longest_batch`.

    Also sets the size of the network (vocabulary, classes) in the objective; with a tokeniser of characters this needs
    a pass over the texts.

    Raises:
        ValueError: When the configured size is below 1.
    """
    import torch

    from lit_llm.data.tokenizer import TRAINED, load_tokenizer

    name = objective.size_name
    if (given := objective.hparams.get(name)) is not None and given < 1:
        raise ValueError(f"model.{name} must be at least 1, but is {given}")
    if name != "vocab_size" or not hasattr(data, "seq_len"):
        data.prepare_data()
        data.setup("fit")
        if objective.hparams.get(name) is None:
            objective.hparams[name] = getattr(data, name)
        objective.planned_for = data
        return longest_batch(data.train_dataloader())
    if objective.hparams.get(name) is None and not objective.hparams.get("weights"):  # the weights know it
        spec = data.tokenizer_spec
        sized = TRAINED.fullmatch(spec)
        objective.hparams[name] = (
            int(sized[2]) if sized else data.vocab_size if spec == "characters" else len(load_tokenizer(spec))
        )
    ids = torch.zeros(data.batch_size, data.seq_len, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    if getattr(data, "mask_documents", False) or getattr(data, "packed", False):
        batch["document_ids"] = ids
    return batch, ids.numel()


def longest_batch(loader: Any) -> tuple[dict[str, Any], int | float]:
    """The largest batch of an epoch and the mean number of tokens (or rows) per batch.

    Of images or a stream only the first batch is read, and taken for both.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    from lit_llm.batch import count_items

    def held(batch: dict[str, Any]) -> int:
        return sum(t.numel() for t in tree_leaves(batch) if isinstance(t, torch.Tensor))

    batches = iter(loader)
    longest = next(batches)
    tokens = [count_items(longest)]
    for batch in batches if "input_ids" in longest and hasattr(loader, "__len__") else ():
        longest = max(longest, batch, key=held)
        tokens.append(count_items(batch))
    return longest, sum(tokens) / len(tokens)


def probe(words: list[str], details: dict[str, Any] | None, steps: int) -> dict[str, Any]:
    """Runs real training steps on this machine, in a temporary run folder.

    Args:
        words: Arguments of `lit-llm fit`.
        details: As returned by `measured_steps`; `None` if that failed.
        steps: Number of steps.

    Returns:
        Seconds per step; tokens per second and device; FLOP/s per device, `None` without `details`; peak memory in
        bytes, as measured by `callbacks.memory_rise`; and the unit (`token` or `example`).
    """
    from lit_llm.callbacks.memory_rise import MemoryRise
    from lit_llm.callbacks.throughput import Throughput
    from lit_llm.cli import training

    folder = Path(tempfile.mkdtemp(prefix="lit-llm-probe-"))
    flags = {
        "run_dir": folder,
        "test_after_fit": False,
        "trainer.max_steps": steps,
        "trainer.max_epochs": -1,
        "trainer.limit_val_batches": 0,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": steps // 2,  # the last report is of the second half, after the warm-up
        "trainer.enable_checkpointing": False,
        "trainer.enable_progress_bar": False,
        "trainer.callbacks+": "lit_llm.callbacks.memory_rise.MemoryRise",
    }
    try:
        given = [f"--{name}={value}" for name, value in flags.items()]
        trainer = training.run(["fit", *words, *given], summary=False).trainer
        throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))
        rise = next(c for c in trainer.callbacks if isinstance(c, MemoryRise)).bytes
        world = trainer.world_size
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rate = throughput.latest["train/tokens_per_second"]
    return {
        "seconds_per_step": throughput.tokens / trainer.global_step / rate,
        "tokens_per_second": rate / world,
        "flops_per_second": rate / world * details["flops_per_token"] if details else None,
        "peak": rise,
        "unit": "token" if throughput.unit == "tok" else "example",
    }
