"""`lit-llm export`: exports a trained network to one file for serving, with the files a server needs beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_llm.cli.parser import OneLineArguments


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    options = _parser().parse_args(words[1:])
    from lit_llm.export import export

    found = export(options.model, options.out, options.format)
    print(
        f"{found.file}: {found.num_bytes / 1e6:.2f} MB; logits differ by at most {found.difference:.1e} "
        f"({found.difference / max(found.spread, 1e-30):.1e} of their spread); one row takes {found.milliseconds:.2f} "
        f"ms, in torch {found.network_milliseconds:.2f} ms (medians)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineArguments(
        prog="lit-llm export",
        description="Export a trained network to one file for serving, with ONNX (pip install 'lit-llm[export]') or "
        "torch.export. The file accepts any number of rows and texts of any length that the network supports. The "
        "tokeniser, class names, image normalisation and a README with a program that runs the model are written next "
        "to it. The exported file is run and kept only if its logits match the network's.",
        epilog="example: lit-llm export --model runs/llama_stdlib/<time> --out exported/llama",
    )
    parser.add_argument("--model", required=True, help="a model directory, a run folder or a checkpoint file")
    parser.add_argument("--out", required=True, type=Path, help="a new or empty folder")
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="file format (default onnx)")
    return parser
