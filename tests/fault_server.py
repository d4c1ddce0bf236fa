"""A loopback server with OpenAI's chat API that misbehaves on demand, and a job for it that is to be killed."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from datasets import Dataset

from dhrd_lib.rationales import SENTINEL, TeacherConfig, generate
from dhrd_lib.rationales.generate import Generation
from dhrd_lib.tasks import Task, load_task


def good_reply(prompt: str, nth: int = 0) -> str:
    """Return the same text for the same prompt: a deterministic teacher that agrees with gold."""
    gold = re.findall(r"^Answer: (.*)$", prompt, flags=re.MULTILINE)[-1]
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"The facts {digest} lead there.\n{SENTINEL} {gold}"


def completion(content: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """Return the body of a chat completion; `message` are further fields of its message."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}


class FaultServer:
    """Answers each request as `plan(prompt, nth)` says, where nth counts the requests for that prompt from 0.

    A plan returns the reply's text, a body (dict), a status, a pair of status and error, or a fault of the
    transport: "hang", "drop" (before the reply), "drop_midway", "broken_json", "html" or "echo_key".
    """

    def __init__(self, plan: Callable[[str, int], Any] = good_reply, delay_s: float = 0.0) -> None:
        self.plan, self.delay_s = plan, delay_s
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.at_once = self.most_at_once = 0
        self.stopping, self.lock = threading.Event(), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that are killed break their connections
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> FaultServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body, owner = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.owner
        prompt = body["messages"][-1]["content"]
        with owner.lock:
            nth = owner.asked[prompt]
            owner.asked[prompt] += 1
            owner.bodies.append(body)
            owner.paths.append(self.path)
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
        try:
            time.sleep(owner.delay_s)
            self._answer(owner.plan(prompt, nth), prompt)
        finally:
            with owner.lock:
                owner.at_once -= 1

    def _answer(self, planned: Any, prompt: str) -> None:
        key, whole = self.headers["Authorization"], json.dumps(completion(f"Why. {SENTINEL} fix"))
        texts = {"html": "<html>Bad gateway</html>", "broken_json": whole[:60], "drop_midway": whole}
        texts["echo_key"] = json.dumps(completion(f"{key} is it. {SENTINEL} fix"))
        if planned == "hang":
            self.owner.stopping.wait(60)
            self.close_connection = True
        elif planned == "drop":
            self._drop()
        elif isinstance(planned, dict):
            self._send(200, json.dumps(planned))
        elif isinstance(planned, str):
            self._send(200, texts.get(planned) or json.dumps(completion(planned)), midway=planned == "drop_midway")
        else:
            status, error = planned if isinstance(planned, tuple) else (planned, {"message": f"status {planned}"})
            self._send(status, json.dumps({"error": {"message": key} if error == "echo_key" else error}))

    def _send(self, status: int, text: str, midway: bool = False) -> None:
        raw = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if text.startswith("<html>") else "application/json")
        self.send_header("Content-Length", str(len(raw)))
        if status == 429:
            self.send_header("Retry-After", "0.5")
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2] if midway else raw)
        if midway:
            self._drop()

    def _drop(self) -> None:
        """Break the connection off with a reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def served(server: FaultServer, **fields: Any) -> TeacherConfig:
    """Return the configuration of a teacher behind the server."""
    return TeacherConfig(**{"kind": "openai", "model": "fixed", "base_url": server.base_url, **fields})


def job(n_rows: int) -> tuple[Task, Dataset]:
    """Return the first rows of the embedded task's train split."""
    task, data = load_task("support_triage")
    return task, data["train"].select(range(n_rows))


def run_job(base_url: str, folder: Path, task: Task, dataset: Dataset, ready: Any = None) -> Generation:
    """Ask for rationales, four at a time, in a process that is to be killed; `ready` is set first."""
    config = TeacherConfig(kind="openai", model="fixed", base_url=base_url, concurrency=4, max_retries=0)
    if ready is not None:
        ready.set()
    return generate(task, dataset, config, folder)
