"""A loopback server with OpenAI's chat API that misbehaves on demand, and the job that is to be killed."""

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

from dhrd_lib.config import TeacherConfig
from dhrd_lib.rationales.generate import Generation, generate
from dhrd_lib.rationales.teachers import SENTINEL
from dhrd_lib.tasks import Task, load_task

STATUS = {"429": 429, "500": 500, "401": 401, "404": 404, "400": 400}


def good_reply(prompt: str, nth: int) -> str:
    """The same words for the same prompt at every time: a deterministic teacher that agrees with gold."""
    gold = re.findall(r"^Answer: (.*)$", prompt, flags=re.MULTILINE)[-1]
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"The facts {digest} lead there.\n{SENTINEL} {gold}"


class FaultServer:
    """Answers each request as `plan(prompt, nth)` says, where nth counts the requests for that prompt from 0.

    A plan's values: "ok", "cut_off", "429" (with Retry-After), "500", "401", "404", "400", "hang", "drop"
    (before the reply), "drop_midway", "broken_json", "html", "no_choices", "null_content", "echo_key" (the
    reply's text quotes the key), "echo_key_500".
    """

    def __init__(
        self,
        plan: Callable[[str, int], str] = lambda prompt, nth: "ok",
        reply: Callable[[str, int], str] = good_reply,
        delay_s: float = 0.0,
        retry_after: str = "0.05",
    ) -> None:
        self.plan, self.reply, self.delay_s, self.retry_after = plan, reply, delay_s, retry_after
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that are killed break their connections
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def take(self, body: dict[str, Any]) -> tuple[str, int]:
        """Count a request; its prompt, and how many there were before with that prompt."""
        prompt = body["messages"][-1]["content"]
        with self._lock:
            nth = self.asked[prompt]
            self.asked[prompt] += 1
            self.bodies.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        return prompt, nth

    def leave(self) -> None:
        """The counterpart of `take`."""
        with self._lock:
            self.at_once -= 1


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, nth = self.owner.take(body)
        try:
            self._answer(self.owner.plan(prompt, nth), prompt, nth)
        finally:
            self.owner.leave()

    def _answer(self, behaviour: str, prompt: str, nth: int) -> None:
        time.sleep(self.owner.delay_s)
        if behaviour == "hang":
            self.owner.stopping.wait(60)
            self.close_connection = True
        elif behaviour == "drop":
            self._drop()
        elif behaviour in STATUS or behaviour == "echo_key_500":
            said = self.headers["Authorization"] if behaviour == "echo_key_500" else f"no luck ({behaviour})"
            extra = {"Retry-After": self.owner.retry_after} if behaviour == "429" else {}
            self._send(STATUS.get(behaviour, 500), json.dumps({"error": {"message": said}}), extra)
        elif behaviour == "html":
            self._send(200, "<html>Bad gateway</html>", {"Content-Type": "text/html"})
        elif behaviour == "broken_json":
            self._send(200, '{"choices": [{"message": {"con')
        elif behaviour == "no_choices":
            self._send(200, json.dumps({"choices": []}))
        else:
            self._chat(behaviour, prompt, nth)

    def _chat(self, behaviour: str, prompt: str, nth: int) -> None:
        text, finish = self.owner.reply(prompt, nth), "stop"
        if behaviour == "cut_off":
            text, finish = "The facts lead to", "length"
        elif behaviour == "null_content":
            text = None
        elif behaviour == "echo_key":
            text = f"{self.headers['Authorization']} {text}"
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        whole = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})
        self._send(200, whole, midway=behaviour == "drop_midway")

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None, midway: bool = False) -> None:
        raw = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
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


def job(n_rows: int) -> tuple[Task, Dataset]:
    """The first rows of the embedded task's train split."""
    task, data = load_task("support_triage")
    return task, data["train"].select(range(n_rows))


def run_job(base_url: str, folder: Path, task: Task, dataset: Dataset, ready: Any = None) -> Generation:
    """What a process does that is to be killed: ask for rationales, four at a time; `ready` is set first."""
    config = TeacherConfig(kind="openai", model="fixed", base_url=base_url, concurrency=4, max_retries=0)
    if ready is not None:
        ready.set()
    return generate(task, dataset, config, folder, progress=False)
