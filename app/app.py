"""Builds the page and starts the server. Torch comes with `build`, and models when they are first asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.settings import MAX_FILE_MIB, MAX_WAITING, Settings
from dhrd_lib.config import WorkbenchError

if TYPE_CHECKING:
    import gradio as gr

TITLE = "DHRD Workbench"
_HEAD = """# DHRD Workbench
**Dual-Head Reasoning Distillation** beside its pooled baseline and chain-of-thought: what each says and what it
costs.
"""
_SESSIONS = 200  # whose state is kept


def build(settings: Settings) -> gr.Blocks:
    """The page with its events and endpoints, not started; no model is loaded."""
    import gradio as gr

    from app.api import Api
    from app.backend import Backend
    from app.batch_tab import BatchTab
    from app.compare_tab import CompareTab
    from app.events import LINE_NOTE
    from app.runs_tab import RunsTab
    from app.training_panel import TrainingPanel

    backend = Backend(settings)
    # Uploads and downloads are looked for every hour, and deleted once they are an hour old.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600), fill_width=False) as page:
        gr.Markdown(_HEAD)
        panel = TrainingPanel(settings)
        with gr.Tab("Compare"):
            compare = CompareTab(backend)
        with gr.Tab("Batch"):
            BatchTab(backend, compare)
        with gr.Tab("Runs") as tab:
            RunsTab(settings).connect_to(tab)
        gr.Markdown(LINE_NOTE, elem_classes="limits")
        panel.connect(page, compare)
        Api(backend).register()
    # Nobody passes by the line: every computation waits in it, and it has an end.
    return page.queue(max_size=MAX_WAITING, api_open=False)


def launch(page: gr.Blocks, settings: Settings, **more: Any) -> Any:
    """Start the server; it answers this machine alone, unless the settings name another host."""
    import gradio as gr

    # The system's own fonts: nothing is asked of another server.
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
    results: Annotated[Path, typer.Option(envvar="DHRD_RESULTS", help="Folder of stored results.")] = Path(
        "notebooks/results"
    ),
    backbone: Annotated[
        str, typer.Option(envvar="DHRD_APP_BACKBONE", help="Asked for CoT where a task has no run.")
    ] = "smollm2-135m",
    host: Annotated[str, typer.Option(envvar="DHRD_APP_HOST", help="Not loopback: needs a user.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(envvar="DHRD_APP_PORT", help="Left out: a free one from 7860.")
    ] = None,
    user: Annotated[str | None, typer.Option(envvar="DHRD_APP_USER", help="Who may log in.")] = None,
    password: Annotated[
        str | None, typer.Option(envvar="DHRD_APP_PASSWORD", help="Set it in the environment, not here.")
    ] = None,
) -> None:
    """Open the page: DHRD, its pooled baseline and CoT side by side."""
    try:
        settings = Settings(runs, results, backbone, host, port, user or None, password or None)
        page = build(settings)
    except WorkbenchError as error:
        sys.exit(f"app: {error}")
    _, address, _ = launch(page, settings, prevent_thread_lock=True)
    print(f"The page is at {address}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    typer.run(main)
