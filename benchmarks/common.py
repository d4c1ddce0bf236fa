"""What every benchmark needs: its command's options, a fresh process for a measurement, and a result file."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch

from dhrd_lib.runs import environment, write_json

# On a CPU, others' training and pipelines compute in float32 unless they are told otherwise.
COMPARED_DTYPE = "auto" if torch.cuda.is_available() else "float32"


def parse_args(doc: str, arguments: Sequence[str] | None, **options: tuple[Any, str]) -> argparse.Namespace:
    """Parse a benchmark's options, each given as `name=(default, help)`.

    The default gives the type; a list takes several values, and `...` makes a positional argument of one or more.
    `doc` is the module's docstring, whose first line is the description. `--out` and the start time are added.
    """
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, (default, help_) in (options | {"out": ("runs/bench", "folder of the results")}).items():
        if default is ...:
            parser.add_argument(name, nargs="+", help=help_)
            continue
        several = isinstance(default, list)
        kind = type(default[0] if several else default)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, nargs="+" if several else None, default=default, help=help_)
    return parser.parse_args(arguments, argparse.Namespace(started=time.perf_counter()))


def write_result(
    name: str,
    result: dict[str, Any],
    options: argparse.Namespace,
    device: torch.device | str = "cpu",
    figure: go.Figure | None = None,
) -> dict[str, Any]:
    """Write OUT/NAME.json, and OUT/NAME.html where there is a figure; return what the JSON file holds.

    Options, environment and the seconds since the start are added to the result.
    """
    settings = {name: value for name, value in vars(options).items() if name not in ("started", "out")}
    seconds = time.perf_counter() - options.started
    result |= {"settings": settings, "environment": environment(torch.device(device)), "seconds": seconds}
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", result)
    if figure is not None:
        figure.write_html(folder / f"{name}.html", include_plotlyjs=True)
    print(f"{seconds:.0f} s in all; results in {folder / name}.json")
    return result


def in_own_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that has imported the library and done nothing else; return its result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dhrd_lib.training"])
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(measure, *arguments).result()
