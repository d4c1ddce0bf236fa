"""Settings, what importing the app loads, and how the page queues computations."""

from __future__ import annotations

import subprocess
import sys

import pytest
from app_runs import store_runs

from app.app import build
from app.settings import MAX_WAITING, Settings
from dhrd_lib.config import ConfigError
from dhrd_lib.modeling import DHRDModel


def test_user_needs_password():
    with pytest.raises(ConfigError, match="There is a user and no password"):
        Settings(user="ada")


def test_public_host_needs_user():
    for host in ("127.0.0.1", "localhost", "::1"):
        assert Settings(host=host).user is None
    with pytest.raises(ConfigError, match=r"host is '0\.0\.0\.0'"):
        Settings(host="0.0.0.0")
    assert "a long secret" not in repr(Settings(host="0.0.0.0", user="ada", password="a long secret"))


def test_import_loads_no_torch_and_no_gradio():
    code = "import app.app, sys; print([name for name in ('torch', 'gradio') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_build_loads_no_model(tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model is loaded")

    settings = Settings(runs=store_runs(tmp_path), backbone="tiny")
    monkeypatch.setattr(DHRDModel, "from_pretrained", load)
    monkeypatch.setattr("app.backend.load_backbone", load)
    page = build(settings)
    assert page.analytics_enabled is False


def test_computations_share_one_bounded_queue(tmp_path):
    page = build(Settings(runs=tmp_path, backbone="tiny"))
    computing = [fn for fn in page.fns.values() if fn.concurrency_id == "compute"]
    assert {fn.api_name for fn in computing} >= {"classify", "classify_rows", "cot", "rationale"}
    assert {fn.concurrency_limit for fn in computing} == {1}
    assert page._queue.max_size == MAX_WAITING
    assert page.api_open is False
