"""Comparisons, ablations, statistics and figures of stored runs."""
