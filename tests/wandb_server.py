"""The part of Weights & Biases' server that `wandb sweep` and `wandb agent` use: it hands out given trials."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


class Sweeps:
    """A server with one sweep.

    Attributes:
        config: The sweep, as uploaded by `wandb sweep`.
        trials: The settings handed out to agents in order; after the last one, agents are told to exit.
    """

    def __init__(self, trials: list[dict[str, Any]]) -> None:
        self.config: dict[str, Any] = {}
        self.trials = trials
        self._started = 0

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The response data of a GraphQL operation."""
        if operation == "Viewer":
            return {"viewer": {"id": "1", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}}
        if operation == "UpsertSweep":
            self.config = yaml.safe_load(variables["config"])
            project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "us"}}
            return {"upsertSweep": {"sweep": {"id": "1", "name": "s", "project": project}}}
        if operation == "SweepWithRuns":
            config = yaml.safe_dump(self.config)
            return {"project": {"sweep": {"id": "1", "name": "s", "config": config, "runs": {"edges": []}}}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "1"}}}
        assert operation == "Heartbeat", operation
        commands = []
        if not json.loads(variables["runState"]):  # the agent is idle
            commands = [self._next()]
        return {"agentHeartbeat": {"agent": {"id": "1"}, "commands": json.dumps(commands)}}

    def _next(self) -> dict[str, Any]:
        if self._started == len(self.trials):
            return {"type": "exit"}
        settings = self.trials[self._started]
        self._started += 1
        args = {name: {"value": value} for name, value in settings.items()}
        return {"type": "run", "run_id": f"trial{self._started}", "program": self.config["program"], "args": args}


@contextlib.contextmanager
def serving(sweeps: Sweeps) -> Iterator[dict[str, str]]:
    """Serves during the block; yields the environment variables with which `wandb` finds the server."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            asked = json.loads(body)
            operation = asked["query"].split("(")[0].split("{")[0].split()[-1]
            data = json.dumps({"data": sweeps.answer(operation, asked.get("variables") or {})}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Logs nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
            "WANDB_API_KEY": "a" * 40,
            "WANDB_ERROR_REPORTING": "false",
        }
        server.shutdown()
