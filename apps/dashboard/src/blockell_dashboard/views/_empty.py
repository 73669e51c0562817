"""What to say when there is nothing to show."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from blockell_format.snapshots import Problem

from ..io import RunChoice
from ._overview import show_problems
from ._text import DEMO_COMMANDS, escape

__all__ = ["explain_no_run", "explain_unreadable"]


def explain_no_run(directories: Sequence[str], problems: Sequence[Problem]) -> None:
    """The page for directories without a run."""
    st.header("No run to show yet", anchor=False)
    st.markdown(
        "A run is a directory with a `run.json`, which a training job writes together with its "
        "topology snapshots, or with the `retention.jsonl` of a retention experiment. Looked in, "
        "and up to three levels below:"
    )
    reasons = {str(problem.path): problem.reason for problem in problems}
    for directory in directories:
        reason = reasons.get(directory, "holds no run")
        st.markdown(f"- **{escape(directory)}** {escape(reason)}")
    _offer_demo("Make one")
    rest = [problem for problem in problems if str(problem.path) not in directories]
    show_problems(rest)


def explain_unreadable(choice: RunChoice, reason: str) -> None:
    """The page for a directory whose run.json cannot be used."""
    st.header(escape(choice.label), anchor=False)
    st.error(f"This directory cannot be opened as a run.\n\n{escape(reason)}")
    st.markdown("Choose another run in the sidebar, if there is one.")
    _offer_demo("Or make one")


def _offer_demo(title: str) -> None:
    st.subheader(title, anchor=False)
    st.code(DEMO_COMMANDS, language="bash")
    st.caption("This page opens the run as soon as its first files are there.")
