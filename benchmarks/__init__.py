"""Benchmarks of speed, memory and growth: `python -m benchmarks.throughput`, or `make bench BENCH=throughput`."""

import dhrd_lib  # noqa: F401  Sets how threads wait, before torch is imported.
