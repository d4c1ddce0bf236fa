"""Benchmarks of speed, memory and growth: `python -m benchmarks.throughput`, or `make bench BENCH=throughput`."""
