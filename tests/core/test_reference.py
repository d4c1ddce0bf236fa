"""Refactorings keep the figures: losses, predictions and weights equal those of a reference commit, bit for bit."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from reference_figures import CELLS

# The last commit before the library was split into packages; stored results are comparable with its figures.
REFERENCE = "847f33e"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_figures_equal_those_of_the_reference_commit(tmp_path):
    subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-f", tmp_path / "old", REFERENCE], check=True)
    results = []
    for code in (tmp_path / "old", ROOT):
        out = tmp_path / f"{len(results)}.json"
        command = [sys.executable, ROOT / "tests" / "core" / "reference_figures.py", out]
        environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=tmp_path, env=environment)
        results.append(json.loads(out.read_text()))
    subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", tmp_path / "old"], check=True)
    old, new = results
    assert set(old) == set(new) == set(CELLS)
    for name in CELLS:
        assert new[name]["weights"] == old[name]["weights"], name
        for term, values in new[name]["history"].items():  # beta = 0 logs no figures of its untrained classifier.
            assert values == pytest.approx(old[name]["history"][term], abs=1e-9, nan_ok=True), (name, term)
        for split, rows in new[name]["predictions"].items():
            if "probabilities" in rows[0]:
                assert rows == old[name]["predictions"][split], (name, split)
