"""The sidebar: which run, which layer, whether to follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from blockell_format.snapshots import LayerInfo, Run

from ..io import RunChoice, opens
from ..layers import layer_label, layer_order
from ._state import choose
from ._text import escape

__all__ = [
    "PAGES",
    "choose_layer",
    "choose_page",
    "choose_run",
    "show_about",
    "show_config",
    "show_live_switch",
]

PAGES = ("topology", "retention", "compare")

_ABOUT = """\
A **Block-ELL** weight is cut into tiles of B by B numbers. Every block row holds the same number of
tiles; the **topology** says in which block columns they lie. At a **decision** the training job
drops weak blocks and lets others be born in their place.

- **Age**: training steps since a block was born.
- **Score**: what decides whether a block stays; higher is safer.
- **Swap rate**: share of the blocks replaced at a decision. Below 1% the topology is frozen,
  above 10% it forgets what it learned.
- **Column entropy**: 1 when all input columns are read by equally many blocks.
"""


def choose_run(choices: Sequence[RunChoice]) -> RunChoice:
    """Pick a run; by default the newest that can be opened."""
    by_label = {choice.label: choice for choice in choices}
    labels = list(by_label)
    asked = st.session_state.get("run", st.query_params.get("run"))
    if asked in by_label:
        choose("run", labels, labels[0])
    else:
        good = (choice.label for choice in choices if opens(choice.path))
        choose("run", labels, next(good, labels[0]))
        _say_missing("run", asked)
    label = st.selectbox("Run", labels, key="run", help="Newest first")
    return by_label[label]


def _say_missing(what: str, asked: str | None) -> None:
    """Tell who followed a link, or whose run was deleted, that something else is shown."""
    if asked is not None:
        shown = escape(st.session_state[what])
        text = f"There is no {what} {escape(asked)} here; this is {shown}."
        st.toast(text, icon=":material/link_off:", duration="long")


def choose_page(pages: Sequence[str]) -> str:
    """One of the pages that there is something to show on."""
    choose("page", pages, pages[0])
    if len(pages) == 1:
        return pages[0]
    picked = st.segmented_control(
        "Page", pages, format_func=str.capitalize, required=True, key="page"
    )
    return picked or pages[0]


def choose_layer(layers: Mapping[str, LayerInfo]) -> LayerInfo:
    """Pick a layer, in the order of the blocks."""
    names = sorted(layers, key=layer_order)
    labels = {name: layer_label(name) for name in names}
    if len(set(labels.values())) < len(labels):
        labels = {name: name for name in names}
    asked = None if "layer" in st.session_state else st.query_params.get("layer")
    choose("layer", names, names[0])
    if asked not in names:
        _say_missing("layer", asked)
    name = st.selectbox("Layer", names, format_func=lambda name: labels[name], key="layer")
    return layers[name]


def show_live_switch() -> float | None:
    """Whether and how often to look for new snapshots; None when paused."""
    live = st.toggle("Live", value=True, key="live", help="Look for new snapshots and metrics")
    interval_s = st.select_slider(
        "Look every", (2, 3, 4, 5), value=3, format_func=lambda s: f"{s} s", disabled=not live
    )
    return float(interval_s) if live else None


def show_config(run: Run) -> None:
    """The run's own configuration."""
    with st.expander("Configuration", icon=":material/tune:"):
        st.json(run.config, expanded=1)


def show_about() -> None:
    """What the words mean."""
    with st.expander("What am I looking at?", icon=":material/help:"):
        st.markdown(_ABOUT)
