"""Fragments that look for new data every few seconds and redraw the page only if there is some."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from ..io import find_runs

__all__ = ["watch_for_runs"]

_INTERVAL_S = 3.0


def watch_for_runs(directories: Sequence[str], known: int = 0) -> None:
    """Redraw the page once another number of runs is there, or after a bad one changed."""

    @st.fragment(run_every=_INTERVAL_S)
    def look() -> None:
        if len(find_runs(directories)[0]) != known:
            st.rerun()

    look()
