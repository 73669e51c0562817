"""The Streamlit page: what to show where. Numbers come from `stats`, charts from `figures`."""

from ._app import show_app

__all__ = ["show_app"]
