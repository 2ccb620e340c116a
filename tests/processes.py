"""Runs command lines in several processes, as torchrun does: one process imports everything, and forks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.writing import REPOSITORY


class Ended(NamedTuple):
    codes: list[int]
    err: str


def run(*commands: tuple[int, list[object]], timeout: int = 400) -> list[Ended]:
    """Runs command lines in sequence, each in the given number of single-threaded processes; returns how each ended.

    `{rank}` in a word is replaced by the rank of the process.

    A process that runs for longer than `timeout` seconds, as in a deadlock, is ended by an alarm (code -14).
    """
    asked = [(count, [str(word) for word in words]) for count, words in commands]
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes"],
        input=json.dumps([timeout, asked]),
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [Ended(*found) for found in json.loads(done.stdout)]


def _fork(words: list[str], rank: int, count: int, port: int, folder: Path, timeout: int) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(timeout)
    output = os.open(folder / f"{port}-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.pop("LIT_LLM_RUN_DIR", None)
    if count > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": f"job-{port}"}
        os.environ |= {name: str(value) for name, value in places.items()}
    code = 0
    try:
        from lit_llm.cli import main

        main([word.replace("{rank}", str(rank)) for word in words])
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def _main() -> None:
    import tempfile

    import lightning.pytorch
    import transformers

    import lit_llm.cli.training
    import lit_llm.strategies  # noqa: F401

    assert lightning.pytorch
    assert transformers.AutoModel
    found = []
    with tempfile.TemporaryDirectory() as name:
        timeout, commands = json.load(sys.stdin)
        for count, words in commands:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            children = [_fork(words, rank, count, port, Path(name), timeout) for rank in range(count)]
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            err = "".join(path.read_text() for path in sorted(Path(name).glob(f"{port}-*.txt")))
            found.append([codes, err])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main()
