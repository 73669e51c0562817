"""What is selected, kept in the page's address so that a link brings it back.

The address is read once per session and key; afterwards the widgets lead and the address follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import streamlit as st

__all__ = ["choose", "choose_earlier", "choose_several", "choose_step", "move_step", "publish"]

KEYS = (
    "run",
    "page",
    "layer",
    "step",
    "colour",
    "since",
    "setting",
    "task",
    "method",
    "matrix",
    "runs",
    "metric",
)
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


def choose_several(key: str, options: Sequence[str], default: Sequence[str]) -> list[str]:
    """The same for any number of choices; the address has them one by one."""
    current = st.session_state.get(key)
    if current is None:
        current = st.query_params.get_all(key) or default
    st.session_state[key] = [value for value in current if value in options]
    return list(st.session_state[key])


def choose_step(steps: Sequence[int]) -> int:
    """The selected step: the nearest recorded one to what was asked for.

    While the newest step is selected, the selection follows a growing run.
    """
    newest = steps[-1]
    asked = st.session_state.get("step")
    if asked is None:  # a new session, or another page was shown in between
        asked = _as_int(st.query_params.get("step"), newest)
    if asked == st.session_state.get(_NEWEST):
        asked = newest
    st.session_state["step"] = _nearest(steps, asked)
    st.session_state[_NEWEST] = newest
    return st.session_state["step"]


def choose_earlier(steps: Sequence[int]) -> int:
    """The step to compare with: the nearest recorded one, by default the first."""
    asked = st.session_state.get("since")
    if asked is None:
        asked = _as_int(st.query_params.get("since"), steps[0])
    st.session_state["since"] = _nearest(steps, asked)
    return st.session_state["since"]


def _nearest(steps: Sequence[int], asked: int) -> int:
    return steps[int(np.abs(np.asarray(steps, dtype=np.float64) - asked).argmin())]


def move_step(steps: Sequence[int], by: int) -> None:
    """Callback of the previous and next buttons."""
    position = steps.index(st.session_state["step"]) + by
    st.session_state["step"] = steps[min(max(position, 0), len(steps) - 1)]


def publish() -> None:
    """Write the selection into the address."""
    for key in KEYS:
        value = st.session_state.get(key)
        texts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
        if value not in (None, "", []) and st.query_params.get_all(key) != texts:
            st.query_params[key] = texts if isinstance(value, list) else texts[0]


def _as_int(text: str | None, default: int) -> int:
    try:
        return int(text) if text is not None else default
    except ValueError:
        return default
