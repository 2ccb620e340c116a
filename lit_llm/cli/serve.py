"""`lit-llm serve`: serves a trained model over HTTP."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
from typing import Any

from lit_llm.cli.parser import OneLineArguments
from lit_llm.ranges import require_at_least
from lit_llm.wording import needing

log = logging.getLogger(__name__)

HOSTS = ("127.0.0.1", "0.0.0.0", "::")


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    options = _parser().parse_args(words[1:])
    serve(**vars(options))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineArguments(
        prog="lit-llm serve",
        description="Serve a trained model over HTTP with LitServe. A language model continues prompts at "
        "/v1/completions or, if its tokeniser has a chat template, chats at /v1/chat/completions, both in OpenAI's "
        "format; a classifier of texts or images answers at /classify. /docs documents the API, and /health reports "
        "whether the server is up. If LIT_SERVER_API_KEY is set, requests must send it in the X-API-Key header.",
        epilog="examples: lit-llm serve --model runs/first; "
        "curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{\"prompt\": \"def main(\"}'",
    )
    parser.add_argument("--model", required=True, help="a model directory, a run folder or a checkpoint file")
    parser.add_argument(
        "--host", choices=HOSTS, default=HOSTS[0], help="127.0.0.1 (default) for local access, 0.0.0.0 or :: for others"
    )
    parser.add_argument("--port", type=int, default=8000, help="from 1024 to 65535 (default 8000)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="device to run the model on; default: the accelerator if there is one",
    )
    parser.add_argument(
        "--max_batch_size",
        type=int,
        default=8,
        help="maximum number of waiting requests to a classifier that are batched (default 8)",
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="maximum seconds that a request waits (default 60)")
    return parser


def serve(model: str, host: str, port: int, device: str, max_batch_size: int, timeout: float) -> None:
    """Answers requests until Ctrl-C; arguments as in `lit-llm serve --help`.

    Raises:
        ImportError: When LitServe is not installed.
        ValueError: When an option is out of range, the port is in use, the device does not exist, or the model is of a
            kind that cannot be served.
    """
    with needing("litserve", "serving", "to serve"):
        import litserve
    if not 1024 <= port <= 65535:
        raise ValueError(f"--port must be from 1024 to 65535, but is {port}")
    require_at_least(1, "--", max_batch_size=max_batch_size)
    if timeout <= 0:
        raise ValueError(f"--timeout must be above 0, but is {timeout:g}")
    _require_free(host, port)
    import torch

    from lit_llm.serving import endpoint_of

    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device in there and not there[device]():
        raise ValueError(f"--device must be one that torch finds here, but is {device}")
    endpoint = endpoint_of(model, max_batch_size)
    server = litserve.LitServer(
        endpoint,
        accelerator=device,
        devices=1,
        timeout=timeout,
        model_metadata={"model": model},
        max_payload_size=50_000_000,
    )
    shown = f"[{host}]" if ":" in host else host
    log.info(
        f"{model} answers at http://{shown}:{port}{endpoint.path} as soon as it is loaded; API documentation: /docs; "
        f"stop with Ctrl-C"
    )
    own = os.getpid()

    def end(number: int, frame: Any) -> None:
        """Ends the server once, as Ctrl-C does; in its forked processes, exits without a traceback."""
        for further in (signal.SIGINT, signal.SIGTERM):
            signal.signal(further, signal.SIG_IGN)
        logging.getLogger("litserve").setLevel(logging.CRITICAL)  # its monitor reports that processes ended
        raise KeyboardInterrupt if os.getpid() == own else SystemExit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    server.run(host=host, port=port, generate_client_file=False, log_level="warning")


def _require_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind((host, port))
        except OSError as error:
            raise ValueError(f"--port must be free on {host}, but is {port}: {error.strerror}") from error
