"""What is selected, kept in the page's address so that a link brings it back.

The address is read once per session and key; afterwards the widgets lead and the address follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import streamlit as st

__all__ = ["choose", "choose_step", "move_step", "publish"]

KEYS = ("run", "page", "layer", "step", "colour", "setting", "method", "matrix")
_NEWEST = "_newest_step"


def choose(key: str, options: Sequence[str], default: str) -> str:
    """Make sure that the session holds a valid choice under `key`, and return it.

    In order: the choice so far, the address, the default.
    """
    current = st.session_state.get(key, st.query_params.get(key))
    if current not in options:
        current = default
    st.session_state[key] = current
    return current


def choose_step(steps: Sequence[int]) -> int:
    """The selected step: the nearest recorded one to what was asked for.

    While the newest step is selected, the selection follows a growing run.
    """
    newest = steps[-1]
    asked = st.session_state.get("step")
    if asked is None:
        asked = _as_int(st.query_params.get("step"), newest)
    elif asked == st.session_state.get(_NEWEST):
        asked = newest
    position = int(np.abs(np.asarray(steps, dtype=np.float64) - asked).argmin())
    st.session_state["step"] = steps[position]
    st.session_state[_NEWEST] = newest
    return steps[position]


def move_step(steps: Sequence[int], by: int) -> None:
    """Callback of the previous and next buttons."""
    position = steps.index(st.session_state["step"]) + by
    st.session_state["step"] = steps[min(max(position, 0), len(steps) - 1)]


def publish() -> None:
    """Write the selection into the address."""
    for key in KEYS:
        value = str(st.session_state.get(key, ""))
        if value and st.query_params.get(key) != value:
            st.query_params[key] = value


def _as_int(text: str | None, default: int) -> int:
    try:
        return int(text) if text is not None else default
    except ValueError:
        return default
