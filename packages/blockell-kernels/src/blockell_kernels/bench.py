"""Speed of Block-ELL linear against dense and its peers: `python -m blockell_kernels.bench`.

Every case passes a correctness gate first: output and gradients against the float64 reference. Then
contenders take turns, and 20th, 50th and 80th percentiles are reported, with the TFLOP/s and GB/s
that follow, the share of what this machine can do at best (measured: a large square product, a
large copy), peak memory, and the time that the host is busy with a call. Peers that are not
installed, or do not take a case, are named with the reason.

`--csv` keeps all of it; `--plot` draws the speed-ups (SVG); `--update FILE` replaces the table
between `<!-- bench:cpu -->` and `<!-- /bench:cpu -->` (or cuda).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch

from blockell_kernels._backends import BACKEND_NAMES
from blockell_kernels._bench._cases import MODES, RUNS, BenchCase, BenchOperands, make_operands
from blockell_kernels._bench._ceiling import ceiling, work
from blockell_kernels._bench._contenders import contenders, gate, step_of
from blockell_kernels._bench._peers import PEERS
from blockell_kernels._bench._plot import write_plot
from blockell_kernels._bench._report import Row, facts, markdown, update_section, write_csv
from blockell_kernels._bench._timing import clock_for, host_us, peak_mib, time_all
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
    default = "default: %(default)s"
    add("--shapes", nargs="+", default=SHAPES, metavar="NxINxOUT", help=f"N tokens; {default}")
    add("--layouts", nargs="+", default=LAYOUTS, metavar="TILExROWGROUP", help=default)
    add("--densities", nargs="+", type=float, default=(0.5, 0.25, 0.1), help=default)
    add("--modes", nargs="+", choices=MODES, default=MODES, help=default)
    add("--runs", nargs="+", choices=RUNS, default=("eager",), help=default)
    add("--dtype", choices=DTYPES, default="float32", help=default)
    add("--device", default="cpu", help="as torch names it: cpu, cuda, cuda:1")
    add("--backends", nargs="+", choices=BACKEND_NAMES, default=("auto",), help="of ours")
    names = ", ".join(repr(name) for name in PEERS)
    add(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=("torch BSR", "STK", "cuSPARSE"),
        metavar="P",
        help=f"any of {names}; default: all but the tuned one, whose tuning takes minutes a case",
    )
    add("--rounds", type=int, default=21, help=f"turns of every contender; {default}")
    add("--budget-s", type=float, default=4.0, help=f"seconds per contender and case; {default}")
    add("--cpu-time", action="store_true", help="not wall time; for a busy machine, one thread")
    add("--csv", type=Path, help="write all rows to this file")
    add("--plot", type=Path, help="draw the speed-ups into this SVG file")
    add("--update", type=Path, help="replace the table in this Markdown file")
    options = parser.parse_args(arguments)
    wrong = _wrong(options)
    if wrong:
        parser.error(wrong)
    if options.quick:
        options.shapes, options.layouts = ("256x128x256",), ("16x8",)
        options.densities, options.rounds = (0.5,), 5
    return options


def _wrong(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, or None."""
    number = r"[1-9]\d*"
    for name, count, form in (
        ("shapes", 3, "NxINxOUT, as 2048x640x2560"),
        ("layouts", 2, "TILExROWGROUP, as 16x8"),
    ):
        for text in getattr(options, name):
            if not re.fullmatch("x".join([number] * count), text):
                return f"--{name} (={text!r}) must have the form {form}."
    for density in options.densities:
        if not 0 < density <= 1:
            return f"--densities (={density}) must be in (0, 1]."
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        return f"--device (={options.device!r}): no CUDA device is visible to torch."
    return None


def cases(options: argparse.Namespace) -> Iterable[BenchCase]:
    """All combinations that can be built."""
    combinations = product(
        options.shapes, options.layouts, options.densities, options.modes, options.runs
    )
    for shape, layout, density, mode, run in combinations:
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
            run=run,
            dtype=DTYPES[options.dtype],
            device=options.device,
        )
        if case.impossible:
            print(f"left out: {shape} {layout}: {case.impossible}", file=sys.stderr)
        else:
            yield case


_refused: set[str] = set()


def refuse(why: str) -> None:
    """Say once why somebody is not measured."""
    if why not in _refused:
        _refused.add(why)
        print(f"left out: {why}", file=sys.stderr)


def measure(case: BenchCase, options: argparse.Namespace) -> list[Row]:
    """Gate, then time. SystemExit where ours computes something wrong."""
    operands = make_operands(case)
    for backend in options.backends:
        wrong = gate(case, operands, backend)
        if wrong:
            raise SystemExit(f"wrong result, nothing timed: {case}, {backend}: {wrong}")
    if case.run == "compile":
        torch._dynamo.reset()  # it counts the cases before as recompilations, and gives up
    found = contenders(case, operands, tuple(options.backends), tuple(options.peers), refuse)
    steps = {}
    for contender in found:
        try:
            step = step_of(contender, case, operands)
            if step is not None:
                step()
                steps[contender.name] = step
        except Exception as error:
            if contender.name.startswith(("ours", "nn.Linear")):
                raise
            refuse(f"{contender.name}, {case.run}: {type(error).__name__}: {error}")
    clock = clock_for(case.device, options.cpu_time)
    times = time_all(steps, clock, rounds=options.rounds, budget_s=options.budget_s)
    dense, best = times["nn.Linear"].p50_ms, ceiling(case.device, case.dtype)
    rows = []
    for contender in found:
        name = contender.name
        if name not in times:
            continue
        p50_ms, least = times[name].p50_ms, work(case, contender.dense)
        bound_ms = max(least.flops / best.tflops / 1e9, least.bytes / best.gb_per_s / 1e6)
        rows.append(
            Row(
                case,
                name,
                _chosen(case, operands, name),
                times[name],
                dense / p50_ms,
                tflops=least.flops / p50_ms / 1e9,
                gb_per_s=least.bytes / p50_ms / 1e6,
                ceiling_share=bound_ms / p50_ms,
                peak_mib=peak_mib(steps[name], case.device),
                host_us=host_us(steps[name], case.device),
            )
        )
    return rows


def _chosen(case: BenchCase, o: BenchOperands, name: str) -> str:
    """The backends that ran, if they were ours."""
    if not name.startswith("ours"):
        return ""
    backend = name.removeprefix("ours (").removesuffix(")")
    choices = explain(
        o.x, o.values, o.col_indices, o.bias, row_group=case.row_group, backend=backend
    )
    used = [choice.backend for choice in choices]
    return used[0] if case.mode == "forward" else "/".join(used)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases; print rows as they come, and the table at the end."""
    options = parse(arguments)
    rows: list[Row] = []
    where = facts(options.device, options.cpu_time)
    for case in cases(options):
        for row in measure(case, options):
            rows.append(row)
            print(
                f"{case.tokens:>6} {case.in_features:>5} -> {case.out_features:<5} tile "
                f"{case.tile:<3} group {case.row_group:<2} {case.density:>4.0%} {case.mode:<8} "
                f"{case.run:<7} {row.contender:<16} {row.times.p50_ms:>9.3f} ms "
                f"{row.speedup:>6.2f}x {row.tflops:>7.3g} TFLOP/s {row.ceiling_share:>4.0%} "
                f"{row.chosen}",
                flush=True,
            )
        # after every case: what is measured is kept if the run is stopped
        if options.csv:
            write_csv(options.csv, rows, where)
        if options.plot:
            write_plot(options.plot, rows, where)
    table = markdown(rows, where)
    print("\n" + table)
    if options.update:
        update_section(options.update, torch.device(options.device).type, table)


if __name__ == "__main__":
    main()
