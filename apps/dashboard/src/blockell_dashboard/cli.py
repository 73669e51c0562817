"""The command line: `blockell-dashboard RUN_DIR ...`, and the `export` and `example` commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__

__all__ = ["main"]

_DEFAULT_DIRECTORY = "runs"
_DESCRIPTION = """\
Watch how the block topology of a training run evolves, live or afterwards.

RUN_DIR is a run directory (it holds run.json, or retention.jsonl) or a directory of runs.

  blockell-dashboard export RUN_DIR -o report.html
      writes the charts of a run into one file that needs no server and no network
  blockell-dashboard example RUN_DIR
      writes a made-up run to try the dashboard with

A directory called "export" or "example" opens as ./export or ./example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 error, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"export": _export, "example": _example}
    command = commands.get(arguments[0]) if arguments else None
    try:
        return _serve(arguments) if command is None else command(arguments[1:])
    except KeyboardInterrupt:  # also while Streamlit or Plotly is being imported
        return 130


def _serve(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="blockell-dashboard",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories",
        nargs="*",
        metavar="RUN_DIR",
        default=[_DEFAULT_DIRECTORY],
        help=f"run directories, or directories of runs (default: {_DEFAULT_DIRECTORY})",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--port",
        type=_port,
        help="port to listen on; 0 takes any free one (default: the first free from 8501)",
    )
    parser.add_argument(
        "--address",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only); 0.0.0.0 lets "
        "everyone who reaches this machine read the runs",
    )
    parser.add_argument(
        "--headless",
        "--no-browser",
        action="store_true",
        help="do not open a browser window",
    )
    options = parser.parse_args(arguments)
    for directory in options.directories:
        if not Path(directory).is_dir():
            print(
                f"blockell-dashboard: RUN_DIR (={directory!r}) is not a directory yet; "
                "the page says how to make a demo run.",
                file=sys.stderr,
            )
    # Streamlit takes a second to import: only now, so that --help and errors stay quick.
    from ._server import serve

    return serve(
        [Path(directory) for directory in options.directories],
        address=options.address,
        port=options.port,
        headless=options.headless,
    )


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="blockell-dashboard export",
        description="Write the charts of one run into one HTML file that works offline.",
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="the run directory")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="default: %(default)s"
    )
    parser.add_argument("--step", type=int, help="step of the heatmaps (default: the newest)")
    parser.add_argument(
        "--layer",
        action="append",
        help="layer to include; may be given several times (default: all layers)",
    )
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    options = parser.parse_args(arguments)
    from .export import export_report

    try:
        path = export_report(
            options.run,
            options.output,
            step=options.step,
            layers=options.layer,
            theme=options.theme,
            overwrite=options.force,
        )
    except (ValueError, OSError) as error:
        print(f"blockell-dashboard export: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _example(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="blockell-dashboard example",
        description="Write a made-up run, for trying the dashboard without training anything.",
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="a directory without a run")
    parser.add_argument("--decisions", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    from .example import write_example_run

    try:
        path = write_example_run(options.run, decisions=options.decisions, seed=options.seed)
    except (ValueError, OSError) as error:
        print(f"blockell-dashboard example: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}; open it with: blockell-dashboard {path}")
    return 0


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"port (={text}) must be a number from 0 to 65535.")
    return port
