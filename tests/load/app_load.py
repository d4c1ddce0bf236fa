"""Load on the app: many users on loopback, each asking one thing after another.

    python tests/load/app_load.py http://127.0.0.1:7860 --users 50 --seconds 60 --server-pid 1234
    python tests/load/app_load.py http://127.0.0.1:7860 --users 2 --pause 1 --seconds 7200 --server-pid 1234

The second line is a long watch of its memory at a steady rate. A user classifies a text by a stored DHRD run, and
every fourth time asks for a CoT of `--cot-tokens` instead. Says how many calls were answered, told that the app is
busy, and failed otherwise; latencies as a user has them, line included; and the server's memory from start to end.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated

import httpx
import numpy as np
import psutil
import typer


@dataclass
class Told:
    """Seconds of the calls that were answered, by endpoint; how all calls ended; MiB of the server's memory."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"classify": [], "cot": []})
    ended: Counter = field(default_factory=Counter)
    memory_mib: list[float] = field(default_factory=list)


async def call(client: httpx.AsyncClient, name: str, data: list) -> str:
    """One call by gradio's HTTP interface, streamed to its end: "answered", "busy", or what went wrong."""
    joined = await client.post(f"/gradio_api/call/{name}", json={"data": data})
    if joined.status_code == 503:
        return "busy"
    if joined.status_code != 200:
        return f"HTTP {joined.status_code}"
    event = ""
    async with client.stream("GET", f"/gradio_api/call/{name}/{joined.json()['event_id']}") as answer:
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            if event == "error" and line.startswith("data: "):
                return f"error {line[:200]}"
    return "answered" if event == "complete" else f"ended with {event!r}"


async def user(
    number: int, client: httpx.AsyncClient, run: dict, until: float, tokens: int, pause: float, told: Told
) -> None:
    """Ask until the time is up, with a pause after each; who is told that the app is busy waits half a second."""
    asked = number
    while time.perf_counter() < until:
        asked += 1
        texts = {"text": f"My lamp broke on day {asked}, and the second one too."}
        name = "cot" if asked % 4 == 0 else "classify"
        data = [run["task"], texts, "zero-shot", tokens] if name == "cot" else [run["run"], texts]
        started = time.perf_counter()
        try:
            ended = await call(client, name, data)
        except httpx.HTTPError as error:
            ended = type(error).__name__
        told.ended[ended] += 1
        if ended == "answered":
            told.seconds[name].append(time.perf_counter() - started)
        await asyncio.sleep(0.5 if ended == "busy" else pause)


async def watch(pid: int, until: float, told: Told) -> None:
    """The server's memory, twice a second."""
    process = psutil.Process(pid)
    while time.perf_counter() < until:
        told.memory_mib.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(0.5)


async def load(address: str, users: int, seconds: float, tokens: int, pause: float, pid: int) -> dict:
    """Warm up, let the users ask, and sum up."""
    told, limits = Told(), httpx.Limits(max_connections=2 * users)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        joined = await client.post("/gradio_api/call/runs", json={"data": []})
        answer = await client.get(f"/gradio_api/call/runs/{joined.json()['event_id']}")
        run = next(run for run in json.loads(answer.text.split("data: ", 1)[1])[0] if run["setting"] == "DHRD")
        for name, data in (
            ("classify", [run["run"], {"text": "x"}]),
            ("cot", [run["task"], {"text": "x"}, "zero-shot", 4]),
        ):
            assert await call(client, name, data) == "answered"
        until = time.perf_counter() + seconds
        asking = [user(number, client, run, until, tokens, pause, told) for number in range(users)]
        await asyncio.gather(watch(pid, until, told), *asking)
    return summary(told)


def summary(told: Told) -> dict:
    """What is to be said of a load."""
    latencies = {
        f"{name}_{part}_ms": round(1000 * float(np.percentile(found, percent)))
        for name, found in told.seconds.items()
        if found
        for part, percent in (("p50", 50), ("p95", 95))
    }
    memory = told.memory_mib
    third = len(memory) // 3
    growth = np.mean(memory[-third:]) - np.mean(memory[third : 2 * third])
    return {
        "ended": dict(told.ended),
        **latencies,
        "memory_mib": {"start": round(memory[0]), "end": round(memory[-1]), "most": round(max(memory))},
        "memory_by_tenth_mib": [round(float(part.mean()), 1) for part in np.array_split(memory, 10)],
        "growth_from_middle_to_last_third_mib": round(float(growth), 1),
    }


def main(
    address: str,
    server_pid: Annotated[int, typer.Option(help="Whose memory is watched.")],
    users: int = 50,
    seconds: float = 60,
    cot_tokens: int = 16,
    pause: Annotated[float, typer.Option(help="Seconds of a user between two calls.")] = 0.0,
) -> None:
    """Load the app at an address, and print the summary as JSON."""
    print(json.dumps(asyncio.run(load(address, users, seconds, cot_tokens, pause, server_pid)), indent=2))


if __name__ == "__main__":
    typer.run(main)
