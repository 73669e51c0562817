"""Every chart as a function from arrays to a `plotly.graph_objects.Figure`.

None of them needs Streamlit, so they work in a notebook or a script as well.
"""

from ._ages import age_histogram
from ._series import column_entropy, loss, swap_rate
from ._theme import Palette, Theme, palette
from ._topology import COLOURS, Colour, topology_heatmap

__all__ = [
    "COLOURS",
    "Colour",
    "Palette",
    "Theme",
    "age_histogram",
    "column_entropy",
    "loss",
    "palette",
    "swap_rate",
    "topology_heatmap",
]
