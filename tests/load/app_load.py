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
from collections import Counter, defaultdict
from typing import Annotated

import httpx
import numpy as np
import psutil
import typer

outcomes: Counter[str] = Counter()
seconds_of: defaultdict[str, list[float]] = defaultdict(list)  # by endpoint
memory_mib: list[float] = []


async def call(client: httpx.AsyncClient, name: str, data: list) -> tuple[str, str]:
    """Call an endpoint over HTTP to its end; returns "answered", "busy" or what went wrong, and the last data."""
    joined = await client.post(f"/gradio_api/call/{name}", json={"data": data})
    if joined.status_code != 200:
        return "busy" if joined.status_code == 503 else f"HTTP {joined.status_code}", ""
    event = last = ""
    async with client.stream("GET", f"/gradio_api/call/{name}/{joined.json()['event_id']}") as answer:
        async for line in answer.aiter_lines():
            event = line.removeprefix("event: ") if line.startswith("event: ") else event
            last = line.removeprefix("data: ") if line.startswith("data: ") else last
    return "answered" if event == "complete" else f"{event} {last[:200]}", last


async def user(number: int, client: httpx.AsyncClient, run: dict, until: float, tokens: int, pause: float) -> None:
    """Call until the time is up, with a pause after each call, and half a second after a rejected one."""
    while time.perf_counter() < until:
        number += 1
        texts = {"text": f"My lamp broke on day {number}, and the second one too."}
        name = "cot" if number % 4 == 0 else "classify"
        started = time.perf_counter()
        try:
            data = [run["task"], texts, "zero-shot", tokens, None] if name == "cot" else [run["run"], texts]
            outcome, _ = await call(client, name, data)
        except httpx.HTTPError as error:
            outcome = type(error).__name__
        outcomes[outcome] += 1
        if outcome == "answered":
            seconds_of[name].append(time.perf_counter() - started)
        await asyncio.sleep(0.5 if outcome == "busy" else pause)


async def watch(pid: int, until: float) -> None:
    """Record the server's memory twice a second."""
    process = psutil.Process(pid)
    while time.perf_counter() < until:
        memory_mib.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(0.5)


async def load(address: str, users: int, seconds: float, tokens: int, pause: float, pid: int) -> None:
    """Warm up, then let the users call."""
    limits = httpx.Limits(max_connections=2 * users)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        runs = json.loads((await call(client, "runs", []))[1])[0]
        run = next(run for run in runs if run["setting"] == "DHRD")
        await call(client, "classify", [run["run"], {"text": "x"}])
        await call(client, "cot", [run["task"], {"text": "x"}, "zero-shot", 4, None])
        until = time.perf_counter() + seconds
        calling = (user(number, client, run, until, tokens, pause) for number in range(users))
        await asyncio.gather(watch(pid, until), *calling)


def main(
    address: str,
    server_pid: Annotated[int, typer.Option(help="Process whose memory is recorded.")],
    users: int = 50,
    seconds: float = 60,
    cot_tokens: int = 16,
    pause: Annotated[float, typer.Option(help="Seconds between two calls of a user.")] = 0.0,
) -> None:
    """Load the app at an address and print the summary as JSON."""
    asyncio.run(load(address, users, seconds, cot_tokens, pause, server_pid))
    summary: dict[str, object] = {"outcomes": dict(outcomes)}
    for name, measured in seconds_of.items():
        summary |= {f"{name}_p{p}_ms": round(1000 * float(np.percentile(measured, p))) for p in (50, 95)}
    summary["memory_by_tenth_mib"] = [round(float(part.mean()), 1) for part in np.array_split(memory_mib, 10)]
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    typer.run(main)
