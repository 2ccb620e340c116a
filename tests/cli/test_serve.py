from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lit_llm.checkpoints import save_model
from lit_llm.cli.serve import serve
from lit_llm.data.chat import with_template
from lit_llm.data.tokenizer import byte_tokenizer
from lit_llm.generation import generate
from tests.writing import REPOSITORY

pytest.importorskip("litserve")

from litserve.utils import configure_logging


@pytest.fixture
def model(tiny_llama: Any, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", tiny_llama(vocab_size=257), byte_tokenizer())
    return tmp_path / "model"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_requests_are_answered_until_the_server_is_ended(model: Path, number: signal.Signals, tiny_llama: Any) -> None:
    chats = number == signal.SIGTERM
    network, tokenizer = tiny_llama(vocab_size=257), byte_tokenizer()
    if chats:
        save_model(model, network, with_template(tokenizer))
    port = free_port()
    words = [sys.executable, "-m", "lit_llm", "serve", "--model", str(model), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        until = time.monotonic() + 200
        while ask(port, "/health") != (200, "ok"):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        if chats:
            body = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 5, "stream": True}
            status, answer = ask(port, "/v1/chat/completions", body)
            assert status == 200
            assert answer.count("data: {") >= 2
            assert answer.endswith("data: [DONE]\n\n")
            assert ask(port, "/v1/chat/completions", body | {"n": 2})[0] == 400
            body["stream"] = False
            assert ask(port, "/v1/chat/completions", body | {"temperature": -1})[0] == 400
            one, two = (json.loads(ask(port, "/v1/chat/completions", body | {"n": n})[1]) for n in (None, 2))
            assert [len(answer["choices"]) for answer in (one, two)] == [1, 2]
            assert one["usage"]["prompt_tokens"] == two["usage"]["prompt_tokens"] > 0
        else:
            body = {"prompt": "ab", "max_tokens": 5, "temperature": 0}
            status, answer = ask(port, "/v1/completions", body)
            assert status == 200
            [expected] = generate(network, [[0, *tokenizer.encode("ab")]], 5, temperature=0.0, stop=0)
            assert json.loads(answer)["choices"][0]["text"] == tokenizer.decode(expected)
            assert ask(port, "/v1/completions", body | {"max_tokens": 100})[0] == 400
            assert ask(port, "/v1/completions", body | {"n": 2})[0] == 422
            assert ask(port, "/v1/completions", {"prompt": "a" * 50_000_001})[0] >= 400
            assert "max_tokens" in ask(port, "/openapi.json")[1]
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in err
    assert f"{model} answers at http://127.0.0.1:{port}/v1/" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_said_of_processes_that_end_with_the_server(
    model: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    log = logging.getLogger("litserve.server")

    def run(server: Any, **options: Any) -> None:
        configure_logging(options["log_level"])
        assert log.isEnabledFor(logging.ERROR)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert not log.isEnabledFor(logging.ERROR)

    monkeypatch.setattr("litserve.LitServer.run", run)
    try:
        serve(str(model), "127.0.0.1", free_port(), "cpu", 1, 1.0)
    finally:
        configure_logging()
        for each, handler in before.items():
            signal.signal(each, handler)


def test_mistakes_are_one_line(lit_llm: Any, model: Path, tmp_path: Path) -> None:
    def said(*words: object) -> str:
        outcome = lit_llm("serve", *words)
        assert outcome.code == 2
        return outcome.last_line.removeprefix("lit-llm: error: ")

    assert said("--model", model, "--port", 80) == "--port must be from 1024 to 65535, but is 80"
    assert said("--model", model, "--max_batch_size", 0) == "--max_batch_size must be at least 1, but is 0"
    assert said("--model", model, "--timeout", 0) == "--timeout must be above 0, but is 0"
    assert said("--model", tmp_path / "none", "--port", free_port()).startswith("model must be ")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = f"--port must be free on 127.0.0.1, but is {port}: Address already in use"
        assert said("--model", model, "--port", port) == message
