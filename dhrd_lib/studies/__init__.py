"""Comparisons, ablations, grids and searches of runs, with their statistics and figures."""
