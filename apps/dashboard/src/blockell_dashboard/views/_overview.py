"""The tiles at the top of the page, and the list of problems at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from blockell_format.snapshots import Problem

from .. import stats
from ..io import LoadedRun, RunChoice, find_runs
from ..ranks import describe
from ..retention import retention_stamp
from ..series import SwapHistory
from ._text import duration, escape

__all__ = ["show_overview", "show_problems"]

_NoteColour = Literal["gray", "green", "orange"]


def show_overview(
    choice: RunChoice, loaded: LoadedRun, directories: Sequence[str], interval_s: float | None
) -> None:
    """Tiles with the state of the run. While live, they look for new data and redraw the page."""
    st.header(escape(choice.label), anchor=False)
    _show_divergence(loaded)
    drawn, runs = loaded.version, len(find_runs(directories)[0])
    results = retention_stamp(choice.path) is not None

    @st.fragment(run_every=interval_s)
    def tiles() -> None:
        if interval_s is not None:
            other_runs = len(find_runs(directories)[0]) != runs
            new_results = results != (retention_stamp(choice.path) is not None)
            if loaded.refresh() != drawn or other_runs or new_results:
                st.rerun()
        _show_tiles(loaded)

    tiles()


def _show_tiles(loaded: LoadedRun) -> None:
    run, history = loaded.run, loaded.history()
    steps, problems = history.steps, run.problems
    columns = st.columns(6)
    last = loaded.newest_step
    newest = "none" if last is None else f"{last:,}"
    _tile(columns[0], "Newest step", newest, _count(len(steps), "snapshot"))
    _tile(columns[1], "Layers", str(len(run.layers)), *_ranks(loaded))
    _tile(columns[2], "Density", *_density(loaded, history))
    _tile(columns[3], "Last swap rate", *_last_swap_rate(history))
    age = "none"
    if len(steps):
        age = duration(time.time() - run.snapshot(int(steps[-1])).created)
    _tile(columns[4], "Snapshot age", age, _count(len(run.attempts), "attempt"))
    if problems:
        _tile(columns[5], "Problems", f"{len(problems):,}", "listed below", "orange")
    else:
        _tile(columns[5], "Problems", "0", "all files good", "green")


def _show_divergence(loaded: LoadedRun) -> None:
    """Say where processes that must hold the same topology did not."""
    apart = loaded.divergence()
    if apart is not None:
        st.error(escape(describe(apart)))


def _ranks(loaded: LoadedRun) -> tuple[str, _NoteColour]:
    count = loaded.run.world_size
    if loaded.divergence() is not None:
        return "ranks disagree", "orange"
    if count == 1 or not loaded.run.steps:
        return _count(count, "process", "processes"), "gray"
    return f"{count:,} ranks agree", "green"


def _tile(
    column: DeltaGenerator, label: str, value: str, note: str, colour: _NoteColour = "gray"
) -> None:
    column.metric(
        label,
        value,
        delta=note,
        delta_color=colour,
        delta_arrow="off",
        border=True,
        width="stretch",
    )


def _density(loaded: LoadedRun, history: SwapHistory) -> tuple[str, str]:
    """Live blocks as a share of all positions; before the first snapshot, the slots."""
    layers = loaded.run.layers.values()
    positions = sum(info.R * info.C for info in layers)
    slots = sum(info.R * info.K for info in layers)
    live = int(history.blocks[-1].sum()) if len(history.steps) else slots
    if positions == 0:
        return "none", "no layers"
    return f"{live / positions:.1%}", f"{live:,} blocks"


def _last_swap_rate(history: SwapHistory) -> tuple[str, str, _NoteColour]:
    rates = history.pooled_rates()
    if len(rates) == 0 or not np.isfinite(rates[-1]):
        return "none", "no decision", "gray"
    low, high = stats.HEALTHY_SWAP_RATE
    band = f"{low:.0%}-{high:.0%}"
    if history.still[-1]:
        return f"{rates[-1]:.2%}", "no swaps", "gray"
    if history.pooled_outside()[-1]:
        return f"{rates[-1]:.2%}", f"outside {band}", "orange"
    return f"{rates[-1]:.2%}", f"in {band}", "green"


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def show_problems(problems: Sequence[Problem]) -> None:
    """Everything that could not be read, with the reason; nothing when all is well."""
    if not problems:
        return
    st.subheader(f"Problems ({len(problems):,})", anchor=False)
    st.markdown("These files were left out, or hold something odd. Everything else is shown.")
    table = {
        "file": [problem.path.name for problem in problems],
        "reason": [problem.reason for problem in problems],
        "path": [str(problem).removesuffix(f": {problem.reason}") for problem in problems],
    }
    st.dataframe(table, width="stretch", hide_index=True, key="problems")
