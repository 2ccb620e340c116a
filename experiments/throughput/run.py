"""Compares the speed and memory of `lit-llm fit` and its peers in interleaved runs; writes the table into README.md.

python -m experiments.throughput.run --peers_python PEERS_VENV/bin/python
python -m experiments.throughput.run --device cuda --sizes 124m,350m --peers ours,nanogpt,hf
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments.throughput.report import (
    HERE,
    REPOSITORY,
    environment,
    last_words,
    run_child,
    wait_for_quiet,
    write_table,
)

SIZES = {
    "tiny": {"num_layers": 1, "num_heads": 2, "d_model": 16, "seq_len": 16, "batch_size": 2},  # for the test
    "baby": {"num_layers": 6, "num_heads": 6, "d_model": 384, "seq_len": 256, "batch_size": 12},
    "124m": {"num_layers": 12, "num_heads": 12, "d_model": 768, "seq_len": 1024, "batch_size": 32},
    "350m": {"num_layers": 24, "num_heads": 16, "d_model": 1024, "seq_len": 1024, "batch_size": 16},
}
GOALS = {
    "bf16": {"bare": 0.97, "nanogpt": 1.10, "hf": 1.30, "litgpt": 1.20},
    "fp32": {"bare": 0.97, "nanogpt": 1.00, "hf": 1.08, "litgpt": 1.02},
}
NEEDS = {"hf": "transformers accelerate", "litgpt": "litgpt"}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 peak per second, as stated by the vendor."""

Found = dict[str, Any]


def main(words: list[str] | None = None) -> None:
    """Parses the options, measures, and writes the table."""
    options = parsed(words)
    if options.device == "cuda" and not cuda():
        print("skipped: no CUDA device is here")
        return
    peers = [peer for peer in options.peers if available(peer, options.peers_python)]
    options.work.mkdir(parents=True, exist_ok=True)
    combinations = list(itertools.product(options.sizes, options.vocab_sizes, options.dtypes))
    found: dict[tuple[str, int, str], dict[str, dict[int, Found]]] = defaultdict(lambda: defaultdict(dict))
    for round_ in range(options.rounds):
        for combination in combinations:
            for peer in peers:
                result = measure(peer, *combination, options)
                if result is not None:
                    found[combination][peer][round_] = result
                    with (options.work / "measurements.jsonl").open("a") as file:
                        file.write(json.dumps({"peer": peer, "round": round_, "setting": combination} | result) + "\n")
        if options.table:
            write_table(options.device, table(found, options))


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""

    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=names, default="ours,bare,bare-keep,nanogpt,hf,litgpt")
    parser.add_argument("--dtypes", type=names, help="default: bf16,fp32; on cuda bf16")
    parser.add_argument("--vocab_sizes", type=lambda text: list(map(int, text.split(","))), help="default: 65,50304")
    parser.add_argument("--sizes", type=names, help=f"of {', '.join(SIZES)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on cuda only")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5, help="of the steps, not counted")
    parser.add_argument("--batch_size", type=int, help="instead of the size's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max_wait", type=float, default=120.0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--peers_python", default="runs/peers/bin/python", help="interpreter that has hf and litgpt")
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"), help="corpora, logs, measurements")
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md alone")
    options = parser.parse_args(words)
    on_cpu = options.device == "cpu"
    options.dtypes = options.dtypes or (["bf16", "fp32"] if on_cpu else ["bf16"])
    options.vocab_sizes = options.vocab_sizes or ([65, 50304] if on_cpu else [50304])
    options.sizes = options.sizes or (["baby"] if on_cpu else ["124m", "350m"])
    options.compile = not on_cpu if options.compile is None else options.compile
    options.work = options.work.resolve()
    for name, given, known in (
        ("peers", options.peers, {"ours", "bare", "bare-keep", "nanogpt", "hf", "litgpt"}),
        ("dtypes", options.dtypes, set(GOALS)),
        ("sizes", options.sizes, set(SIZES)),
    ):
        if unknown := set(given) - known:
            parser.error(f"{name} must be of {', '.join(sorted(known))}, but has {', '.join(sorted(unknown))}")
    return options


def cuda() -> bool:
    """Whether there is a CUDA device; checked in a child process, so that this one stays small."""
    found = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, text=True
    )
    return found.stdout.strip() == "True"


def available(peer: str, peers_python: str) -> bool:
    """Whether a peer's packages are installed; prints what is missing."""
    for package in NEEDS.get(peer, "").split():
        if shutil.which(peers_python) is None:
            print(f"{peer} left out: there is no {peers_python} (see README.md)", flush=True)
            return False
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"
        if subprocess.run([peers_python, "-c", code], stderr=subprocess.DEVNULL).returncode:
            print(f"{peer} left out: {peers_python} has no {package} (see README.md)", flush=True)
            return False
    return True


def measure(peer: str, size: str, vocab_size: int, dtype: str, options: argparse.Namespace) -> Found | None:
    """Measures one run in its own process; if it failed, prints why and returns `None`."""
    name = f"{peer}-{size}-{vocab_size}-{dtype}"
    sizes = SIZES[size] | ({"batch_size": options.batch_size} if options.batch_size else {})
    tokens = (options.steps + 2) * sizes["batch_size"] * sizes["seq_len"]
    folder = options.work / f"corpus-{vocab_size}-{tokens}"
    out = options.work / f"{name}.json"
    log = options.work / f"{name}.log"
    env = environment(options.work, options.threads) | ({} if options.compile else {"TORCH_COMPILE_DISABLE": "1"})
    if not prepared(folder, vocab_size, tokens, env, log):
        print(f"{name}: no corpus: {last_words(log)}", flush=True)
        return None
    out.unlink(missing_ok=True)
    shutil.rmtree(out.with_suffix(".run"), ignore_errors=True)
    before = wait_for_quiet(options.max_wait)
    if peer == "ours":
        words = fit_words(folder, out, sizes, vocab_size, dtype, options)
    else:
        setting = {"folder": str(folder), "out": str(out), "vocab_size": vocab_size, "dtype": dtype, **sizes}
        setting |= {name: getattr(options, name) for name in ("steps", "warmup", "device", "compile")}
        python = options.peers_python if peer in NEEDS else sys.executable
        words = [python, "-m", "experiments.throughput.peers", peer, json.dumps(setting)]
    run_child(words, env, log)
    if not out.exists():
        print(f"{name}: failed: {last_words(log)} (all of it: {log})", flush=True)
        return None
    result = json.loads(out.read_text()) | {"others_before": before}
    print(
        f"{name}: {result['tokens_per_second']:,.0f} tokens/s, {result['peak_bytes'] / 2**20:,.0f} MB, "
        f"loss {result['loss']:.3f}, others {result['others_cores']:.2f} cores",
        flush=True,
    )
    return result


def prepared(folder: Path, vocab_size: int, tokens: int, env: dict[str, str], log: Path) -> bool:
    """Makes the corpus if needed, in a child process, so that this one stays small; returns whether it exists."""
    if (folder / "tokens.npy").exists():
        return True
    prepare = "import sys; from pathlib import Path; from experiments.throughput.corpus import prepare; "
    prepare += "prepare(Path(sys.argv[1]), *map(int, sys.argv[2:]))"
    return run_child([sys.executable, "-c", prepare, str(folder), str(vocab_size), str(tokens)], env, log) == 0


def fit_words(
    folder: Path, out: Path, sizes: dict[str, int], vocab_size: int, dtype: str, options: argparse.Namespace
) -> list[str]:
    """Command line of `lit-llm fit` as users run it, plus a callback that reads the clock."""
    flags = {
        "config": HERE / "gpt.yaml",
        "run_dir": out.with_suffix(".run"),
        "model.network.d_model": sizes["d_model"],
        "model.network.num_layers": sizes["num_layers"],
        "model.network.num_heads": sizes["num_heads"],
        "model.network.max_seq_len": sizes["seq_len"],
        "data.path": folder / "text.jsonl",
        "data.tokenizer": folder / "tokenizer",
        "data.seq_len": sizes["seq_len"],
        "data.batch_size": sizes["batch_size"],
        "trainer.accelerator": "gpu" if options.device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.precision": "bf16-mixed" if dtype == "bf16" else "32-true",
        "trainer.max_steps": options.steps,
        "trainer.callbacks+": "experiments.throughput.callbacks.StepClock",
        "trainer.callbacks.path": out,
        "trainer.callbacks.steps": options.steps,
        "trainer.callbacks.warmup": options.warmup,
        "trainer.callbacks.tokens_per_step": sizes["batch_size"] * sizes["seq_len"],
    }
    overlay = [f"--config={REPOSITORY / 'configs/strategy/compile.yaml'}"] if options.compile else []
    given = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "lit_llm", "fit", *given[:1], *overlay, *given[1:]]


def table(found: dict[tuple[str, int, str], dict[str, dict[int, Found]]], options: argparse.Namespace) -> list[str]:
    """Formats everything measured so far as Markdown."""
    one = next((run for peers in found.values() for runs in peers.values() for run in runs.values()), None)
    if one is None:
        return ["Nothing was measured."]
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in one["device"]), None)
    compiled = "compiled" if options.compile else "not compiled"
    threads = "" if options.device == "cuda" else f", {one['threads']} threads"
    lines = [
        f"{one['device']}{threads}, torch {one['torch']}, {compiled}; {options.steps} steps of which {options.warmup} "
        f"do not count; medians of {options.rounds} interleaved rounds, their range in brackets.",
    ]
    for (size, vocab_size, dtype), peers in found.items():
        shape = SIZES[size] | ({"batch_size": options.batch_size} if options.batch_size else {})
        lines += [
            "",
            f"**{size}, vocabulary {vocab_size:,}, {dtype}, batch {shape['batch_size']} × {shape['seq_len']}**",
            "",
            "| | tokens/s | ours is × | goal | peak MB |"
            + (" MFU |" if peak else "")
            + " parameters | loss | others' cores |",
            "| --- | ---: | ---: | ---: | ---: |" + (" ---: |" if peak else "") + " ---: | ---: | ---: |",
        ]
        lowest = min((memory(runs) for peer, runs in peers.items() if peer != "ours"), default=None)
        for peer, runs in peers.items():
            speeds = [run["tokens_per_second"] for run in runs.values()]
            cells = [peer, spread(speeds, ",.0f")]
            goal = GOALS[dtype].get(peer) if options.device == "cpu" else None
            both = sorted(set(runs) & set(peers.get("ours", {})))
            ratios = [peers["ours"][r]["tokens_per_second"] / runs[r]["tokens_per_second"] for r in both]
            cells.append(spread(ratios, ".2f") if peer != "ours" and ratios else "")
            cells.append(f"{goal:.2f} {verdict(statistics.median(ratios) >= goal)}" if goal and ratios else "")
            met = f" {verdict(memory(runs) <= lowest)}" if peer == "ours" and lowest else ""
            cells.append(f"{memory(runs) / 2**20:,.0f}{met}")
            if peak:
                cells.append(f"{statistics.median(speeds) * flops_per_token(size, vocab_size) / peak:.1%}")
            cells.append(f"{next(iter(runs.values()))['parameters'] / 1e6:.2f} M")
            cells.append(f"{statistics.median(run['loss'] for run in runs.values()):.3f}")
            cells.append(f"{max(run['others_cores'] for run in runs.values()):.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def flops_per_token(size: str, vocab_size: int) -> int:
    """`6 N + 12 L D T`, where N counts the matrices and the tied head once (PaLM, arXiv:2204.02311, app. B)."""
    s = SIZES[size]
    matrices = 12 * s["num_layers"] * s["d_model"] ** 2 + vocab_size * s["d_model"]
    return 6 * matrices + 12 * s["num_layers"] * s["d_model"] * s["seq_len"]


def memory(runs: dict[int, Found]) -> float:
    """Median peak, in bytes."""
    return statistics.median(run["peak_bytes"] for run in runs.values())


def verdict(met: bool) -> str:
    """Formats whether a goal was met."""
    return "met" if met else "**missed**"


def spread(values: list[float], form: str) -> str:
    """Formats median and range."""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} [{min(values):{form}}–{max(values):{form}}]"


if __name__ == "__main__":
    main()
