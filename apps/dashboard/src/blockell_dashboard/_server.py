"""Start the Streamlit server of the app in this process."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import streamlit as st

__all__ = ["APP_SCRIPT", "serve"]

APP_SCRIPT = Path(__file__).with_name("app.py")


def serve(directories: Sequence[Path], *, address: str, port: int | None, headless: bool) -> int:
    """Serve the app until interrupted; returns the exit status.

    Args:
        directories: run directories, or directories of runs.
        address: to listen on.
        port: to listen on; 0 takes any free port, None the first free one from 8501.
        headless: do not open a browser.
    """
    config: dict[str, Any] = {
        "server.address": address,
        "server.headless": headless,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": False,
    }
    if port is not None:
        config["server.port"] = port

    @asynccontextmanager
    async def open_browser(_app: st.App) -> AsyncIterator[None]:
        # The socket is bound before the app starts, so the browser's first request waits for us.
        if not headless:
            host = "127.0.0.1" if address in ("0.0.0.0", "::") else address
            webbrowser.open(f"http://{host}:{st.get_option('server.port')}")
        yield

    # The script reads its directories from sys.argv, as it does under `streamlit run`; and
    # Streamlit looks for .streamlit/config.toml beside argv[0].
    sys.argv = [str(APP_SCRIPT)]
    for directory in directories:
        sys.argv += ["--dir", str(directory)]
    try:
        st.App(APP_SCRIPT, lifespan=open_browser).run(config=config)
    except KeyboardInterrupt:
        return 130
    return 0
