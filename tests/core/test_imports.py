"""The rooms of the library: what each may import, and what importing the public names must not load."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# A module imports only modules of its own row or of rows above it (CONTRIBUTING.md).
ROWS = (
    ("config", "progress"),
    ("inputs",),
    ("data",),
    ("tasks", "sequences", "backbones"),
    ("losses", "generation"),
    ("modeling",),
    ("scaling",),
    ("trainer", "training", "runs", "evaluation"),
    ("rationales", "cot"),
    ("studies", "serving"),
    ("widgets",),
    ("__main__",),
)
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "dhrd_lib").rglob("*.py")
}


def imported(module: str) -> set[str]:
    """Return the modules of the library that a module imports when it is loaded."""
    names = set()
    for node in ast.parse(FILES[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dhrd_lib"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in FILES else node.module)
    return names - {module}


@pytest.mark.parametrize("module", sorted(set(FILES) - {"dhrd_lib"}))
def test_imports_point_one_way(module):
    room = module.split(".")[1]
    rooms = {name.split(".")[1] for name in imported(module) if "." in name}
    assert [other for other in rooms - {room} if ROW_OF[other] > ROW_OF[room]] == []


def test_imports_have_no_circle():
    remaining = {module: imported(module) for module in FILES}
    while free := [module for module, names in remaining.items() if not names & set(remaining)]:
        for module in free:
            del remaining[module]
    assert list(remaining) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [("dhrd_lib", "torch"), ("dhrd_lib.serving.classifier", "torch"), ("dhrd_lib.cot", "openai")],
)
def test_import_leaves_out(module, absent):
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("user", "expected"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_spin_briefly_unless_the_user_decides(user, expected):
    others = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    code = "import dhrd_lib, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env={**others, **user}, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
