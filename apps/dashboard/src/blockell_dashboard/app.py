"""The Streamlit script: `streamlit run app.py -- --dir RUN_DIR`."""

from __future__ import annotations

import argparse
import sys

from blockell_dashboard.views import show_app


def _directories() -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dir", action="append", default=[])
    options, _ = parser.parse_known_args(sys.argv[1:])
    return options.dir or ["runs"]


show_app(_directories())
