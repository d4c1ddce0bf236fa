"""Build the page and start the server. Torch is imported by `build`, models are loaded when first used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.settings import MAX_FILE_MIB, MAX_WAITING, Settings
from dhrd_lib.config import WorkbenchError

if TYPE_CHECKING:
    import gradio as gr

_HEAD = """# DHRD Workbench
**Dual-Head Reasoning Distillation** compared with its pooled baseline and chain-of-thought: predictions and
inference cost.
"""
_SESSIONS = 200  # whose state is kept
_RESULTS = Path("notebooks/results")


def build(settings: Settings) -> gr.Blocks:
    """Return the page with its events and endpoints, not started; no model is loaded."""
    import gradio as gr

    from app.api import Api
    from app.backend import Backend
    from app.events import QUEUE_NOTE
    from app.tabs.batch import BatchTab
    from app.tabs.compare import CompareTab
    from app.tabs.runs import RunsTab
    from app.tabs.training import TrainingPanel

    backend = Backend(settings)
    # Every hour, uploads and downloads that are an hour old are deleted.
    with gr.Blocks(title="DHRD Workbench", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_HEAD)
        panel = TrainingPanel(settings)
        with gr.Tab("Compare"):
            compare = CompareTab(backend)
        with gr.Tab("Batch"):
            BatchTab(backend, compare)
        with gr.Tab("Runs") as tab:
            RunsTab(settings, tab)
        gr.Markdown(QUEUE_NOTE, elem_classes="limits")
        panel.connect(page, compare)
        Api(backend).register()
    # No endpoint bypasses the queue, which is bounded.
    return page.queue(max_size=MAX_WAITING, api_open=False)


def launch(page: gr.Blocks, settings: Settings, **more: Any) -> Any:
    """Start the server; it answers this machine only, unless the settings name another host."""
    import gradio as gr

    # System fonts: nothing is requested from another server.
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    return page.launch(
        server_name=settings.host,
        server_port=settings.port,
        auth=(settings.user, settings.password) if settings.user else None,
        share=False,
        quiet=True,
        show_error=True,
        run_history=False,
        enable_monitoring=False,
        allowed_paths=[],
        max_file_size=f"{MAX_FILE_MIB}mb",
        state_session_capacity=_SESSIONS,
        footer_links=["api", "settings"],
        theme=gr.themes.Base(primary_hue="blue", neutral_hue="slate", **fonts),
        css_paths=Path(__file__).with_name("style.css"),
        **more,
    )


def main(
    runs: Annotated[Path, typer.Option(envvar="DHRD_RUNS", help="Folder of runs.")] = Path("runs"),
    results: Annotated[Path, typer.Option(envvar="DHRD_RESULTS", help="Stored ablations.")] = _RESULTS,
    backbone: Annotated[str, typer.Option(envvar="DHRD_APP_BACKBONE", help="Zero-shot CoT's.")] = "smollm2-135m",
    host: Annotated[str, typer.Option(envvar="DHRD_APP_HOST", help="Not loopback: needs a user.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(envvar="DHRD_APP_PORT", help="By default from 7860.")] = None,
    user: Annotated[str | None, typer.Option(envvar="DHRD_APP_USER", help="Who may log in.")] = None,
    password: Annotated[str | None, typer.Option(envvar="DHRD_APP_PASSWORD", help="Use the variable.")] = None,
) -> None:
    """Serve the page: DHRD, its pooled baseline and CoT side by side."""
    try:
        access = {"host": host, "port": port, "user": user, "password": password}
        settings = Settings(runs=runs, results=results, backbone=backbone, **access)
        page = build(settings)
    except WorkbenchError as error:
        sys.exit(f"app: {error}")
    _, address, _ = launch(page, settings, prevent_thread_lock=True)
    print(f"The page is at {address}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    typer.run(main)
