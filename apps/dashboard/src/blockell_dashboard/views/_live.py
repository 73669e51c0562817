"""A fragment that waits for something to happen on disk, and then redraws the page."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

__all__ = ["redraw_when"]

_INTERVAL_S = 3.0


def redraw_when(ready: Callable[[], bool], interval_s: float = _INTERVAL_S) -> None:
    """Ask `ready` every few seconds; redraw the page once it says yes."""

    @st.fragment(run_every=interval_s)
    def look() -> None:
        if ready():
            st.rerun()

    look()
