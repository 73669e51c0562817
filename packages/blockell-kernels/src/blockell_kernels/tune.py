"""Measure on this GPU, once, what the dispatcher decides: `python -m blockell_kernels.tune`.

The package ships a table measured on one kind of GPU. On another, or for layers that it does not
hold, a run of this settles by measurement where the sparse kernel is taken and where the dense
product. The results are kept on disk (the environment variable BLOCKELL_TUNING names another
directory, or "off") and found from then on; training itself never measures anything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from blockell_kernels._tuning import directory
from blockell_kernels._tuning_run import Layout, Shape, tune

__all__ = ["Layout", "Shape", "main", "tune"]

TOKENS = (128, 512, 2048, 8192, 32768)
DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)
LAYOUTS = ("16x8", "32x4", "64x2", "128x1")
SHAPES = ("640x2560", "2560x640")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m blockell_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = "default: %(default)s"
    add("--shapes", nargs="+", default=SHAPES, metavar="INxOUT", help=f"of layers; {default}")
    add("--layouts", nargs="+", default=LAYOUTS, metavar="TILExROWGROUP", help=default)
    add("--tokens", nargs="+", type=int, default=TOKENS, help=default)
    add("--densities", nargs="+", type=float, default=DENSITIES, help=default)
    add("--dtypes", nargs="+", choices=DTYPES, default=("bfloat16",), help=default)
    add("--device", default="cuda", help="as torch names it: cuda, cuda:1")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and store; returns the exit status."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device is visible to torch; there is nothing to tune.", file=sys.stderr)
        return 2
    if directory() is None:
        print("BLOCKELL_TUNING switches the tuning cache off; unset it first.", file=sys.stderr)
        return 2
    try:
        shapes = [Shape.of(text) for text in options.shapes]
        path = tune(
            shapes,
            layouts=[Layout.of(text) for text in options.layouts],
            tokens=options.tokens,
            densities=options.densities,
            dtypes=[DTYPES[name] for name in options.dtypes],
            device=options.device,
            report=print,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
