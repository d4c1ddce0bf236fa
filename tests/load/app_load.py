"""Load test of the app: many users on loopback, each with one call after another.

    python tests/load/app_load.py http://127.0.0.1:7860 --users 50 --seconds 60 --server-pid 1234
    python tests/load/app_load.py http://127.0.0.1:7860 --users 2 --pause 1 --seconds 7200 --server-pid 1234

The second line watches the memory for long at a steady rate. A user classifies a text by a stored DHRD run, every
fourth time by CoT with `--cot-tokens` instead. Prints how many calls were answered, rejected as busy, and failed;
latencies as a user has them, queue included; and the server's memory from start to end.
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
class Measurements:
    """Seconds of the answered calls by endpoint, outcomes of all calls, MiB of the server's memory."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"classify": [], "cot": []})
    outcomes: Counter = field(default_factory=Counter)
    memory_mib: list[float] = field(default_factory=list)


async def call(client: httpx.AsyncClient, name: str, data: list) -> str:
    """Call an endpoint over HTTP to its end; returns "answered", "busy", or what went wrong."""
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
    number: int,
    client: httpx.AsyncClient,
    run: dict,
    until: float,
    tokens: int,
    pause: float,
    measured: Measurements,
) -> None:
    """Call until the time is up, with a pause after each call, and half a second after a rejected one."""
    calls = number
    while time.perf_counter() < until:
        calls += 1
        texts = {"text": f"My lamp broke on day {calls}, and the second one too."}
        name = "cot" if calls % 4 == 0 else "classify"
        data = [run["task"], texts, "zero-shot", tokens] if name == "cot" else [run["run"], texts]
        started = time.perf_counter()
        try:
            outcome = await call(client, name, data)
        except httpx.HTTPError as error:
            outcome = type(error).__name__
        measured.outcomes[outcome] += 1
        if outcome == "answered":
            measured.seconds[name].append(time.perf_counter() - started)
        await asyncio.sleep(0.5 if outcome == "busy" else pause)


async def watch(pid: int, until: float, measured: Measurements) -> None:
    """Record the server's memory twice a second."""
    process = psutil.Process(pid)
    while time.perf_counter() < until:
        measured.memory_mib.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(0.5)


async def load(address: str, users: int, seconds: float, tokens: int, pause: float, pid: int) -> dict:
    """Warm up, let the users call, and summarize."""
    measured, limits = Measurements(), httpx.Limits(max_connections=2 * users)
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
        calling = [user(number, client, run, until, tokens, pause, measured) for number in range(users)]
        await asyncio.gather(watch(pid, until, measured), *calling)
    return summary(measured)


def summary(measured: Measurements) -> dict:
    """Return outcomes, latency percentiles and memory of a load."""
    latencies = {
        f"{name}_{part}_ms": round(1000 * float(np.percentile(seconds, percent)))
        for name, seconds in measured.seconds.items()
        if seconds
        for part, percent in (("p50", 50), ("p95", 95))
    }
    memory = measured.memory_mib
    third = len(memory) // 3
    growth = np.mean(memory[-third:]) - np.mean(memory[third : 2 * third])
    return {
        "outcomes": dict(measured.outcomes),
        **latencies,
        "memory_mib": {"start": round(memory[0]), "end": round(memory[-1]), "most": round(max(memory))},
        "memory_by_tenth_mib": [round(float(part.mean()), 1) for part in np.array_split(memory, 10)],
        "growth_from_middle_to_last_third_mib": round(float(growth), 1),
    }


def main(
    address: str,
    server_pid: Annotated[int, typer.Option(help="Process whose memory is recorded.")],
    users: int = 50,
    seconds: float = 60,
    cot_tokens: int = 16,
    pause: Annotated[float, typer.Option(help="Seconds between two calls of a user.")] = 0.0,
) -> None:
    """Load the app at an address and print the summary as JSON."""
    print(json.dumps(asyncio.run(load(address, users, seconds, cot_tokens, pause, server_pid)), indent=2))


if __name__ == "__main__":
    typer.run(main)
