"""Speed of Block-ELL linear against dense and its peers: `python -m blockell_kernels.bench`.

Every case passes a correctness gate first: output and gradients against the float64 reference. Then
contenders take turns, and 20th, 50th and 80th percentiles are reported. `--csv` keeps all of it;
`--update FILE` replaces the table between `<!-- bench:cpu -->` and `<!-- /bench:cpu -->` (or cuda).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch

from blockell_kernels._backends import BACKEND_NAMES
from blockell_kernels._bench._cases import MODES, BenchCase, make_operands
from blockell_kernels._bench._contenders import contenders, gate
from blockell_kernels._bench._report import Row, facts, markdown, update_section, write_csv
from blockell_kernels._bench._timing import clock_for, time_all
from blockell_kernels._functional import explain

SHAPES = ("2048x640x2560", "2048x2560x640", "8192x128x512", "8192x512x128")
LAYOUTS = ("16x1", "16x8", "64x1")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
DTYPES |= {"bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m blockell_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two small cases, a few seconds")
    add("--shapes", nargs="+", default=SHAPES, metavar="NxINxOUT", help="default: %(default)s")
    add("--layouts", nargs="+", default=LAYOUTS, metavar="TILExROWGROUP", help="%(default)s")
    add("--densities", nargs="+", type=float, default=(0.5, 0.25, 0.1))
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", default="cpu", help="as torch names it: cpu, cuda, cuda:1")
    add("--backends", nargs="+", choices=BACKEND_NAMES, default=("auto",), help="of ours")
    add("--rounds", type=int, default=21)
    add("--budget-s", type=float, default=4.0, help="seconds per contender and case, at most")
    add("--cpu-time", action="store_true", help="not wall time; for a busy machine, one thread")
    add("--csv", type=Path, help="write all rows to this file")
    add("--update", type=Path, help="replace the table in this Markdown file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.layouts = ("256x128x256",), ("16x8",)
        options.densities, options.rounds = (0.5,), 5
    return options


def cases(options: argparse.Namespace) -> Iterable[BenchCase]:
    """All combinations that can be built."""
    combinations = product(options.shapes, options.layouts, options.densities, options.modes)
    for shape, layout, density, mode in combinations:
        tokens, in_features, out_features = (int(part) for part in shape.split("x"))
        tile, row_group = (int(part) for part in layout.split("x"))
        case = BenchCase(
            tokens=tokens,
            in_features=in_features,
            out_features=out_features,
            tile=tile,
            row_group=row_group,
            density=density,
            mode=mode,
            dtype=DTYPES[options.dtype],
            device=options.device,
        )
        if case.impossible:
            print(f"left out: {shape} {layout}: {case.impossible}", file=sys.stderr)
        else:
            yield case


def measure(case: BenchCase, options: argparse.Namespace) -> list[Row]:
    """Gate, then time. SystemExit where ours computes something wrong."""
    operands = make_operands(case)
    for backend in options.backends:
        wrong = gate(case, operands, backend)
        if wrong:
            raise SystemExit(f"wrong result, nothing timed: {case}, {backend}: {wrong}")
    steps = contenders(case, operands, tuple(options.backends))
    clock = clock_for(case.device, options.cpu_time)
    times = time_all(steps, clock, rounds=options.rounds, budget_s=options.budget_s)
    dense = times["nn.Linear"].p50_ms
    rows = []
    for name, percentiles in times.items():
        chosen = ""
        if name.startswith("ours"):
            backend = name.removeprefix("ours (").removesuffix(")")
            o = operands
            choices = explain(
                o.x, o.values, o.col_indices, o.bias, row_group=case.row_group, backend=backend
            )
            used = [choice.backend for choice in choices]
            chosen = used[0] if case.mode == "forward" else "/".join(used)
        rows.append(Row(case, name, chosen, percentiles, dense / percentiles.p50_ms))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases; print rows as they come, and the table at the end."""
    options = parse(arguments)
    rows: list[Row] = []
    for case in cases(options):
        for row in measure(case, options):
            rows.append(row)
            print(
                f"{case.tokens:>6} {case.in_features:>5} -> {case.out_features:<5} tile "
                f"{case.tile:<3} group {case.row_group:<2} {case.density:>4.0%} {case.mode:<8} "
                f"{row.contender:<14} {row.times.p50_ms:>9.3f} ms {row.speedup:>6.2f}x "
                f"{row.chosen}",
                flush=True,
            )
    where = facts(options.device, options.cpu_time)
    table = markdown(rows, where)
    print("\n" + table)
    if options.csv:
        write_csv(options.csv, rows, where)
    if options.update:
        update_section(options.update, torch.device(options.device).type, table)


if __name__ == "__main__":
    main()
