"""Runs products once each inside a profiler range, for Nsight Compute's counters.

    ncu --profile-from-start off --csv --page raw --metrics METRICS python profile_gpu.py > ncu.csv

with METRICS from `--metrics` (printed and nothing run). `--table ncu.csv` turns the profiler's
output into a Markdown table. The cells are those that miss their target, and their dense product.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable

import torch
from tune_gpu import Problem

from blockell_kernels._backends import DIRECTIONS, get_backend
from blockell_kernels._triton import _mlp

METRICS = {
    "gpu__time_duration.sum": "ns",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed": "shared %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "launch__waves_per_multiprocessor": "waves",
}
CELLS = [
    (8192, 640, 2560, 128, 1, 0.5),
    (8192, 2560, 640, 128, 1, 0.5),
    (8192, 640, 2560, 128, 1, 0.25),
    (65536, 2560, 640, 128, 1, 0.5),
    (8192, 4096, 14336, 128, 1, 0.25),
    (8192, 2560, 640, 64, 1, 0.5),
    (8192, 640, 2560, 32, 4, 0.5),
    (8192, 640, 2560, 16, 8, 0.5),
]


def products(p: Problem) -> dict[str, Callable[[], object]]:
    b = get_backend("triton")
    found = {
        "forward": lambda: b.forward(p.x, p.values, None, p.pattern),
        "grad_input": lambda: b.grad_input(p.dy, p.values, p.pattern),
        "grad_values": lambda: b.grad_values(p.dy, p.x, p.pattern),
    }
    found |= {f"dense {d}": p.dense_product(d) for d in DIRECTIONS}
    if p.pattern.B == 128:
        found["forward, gelu"] = lambda: _mlp.forward_activated(
            p.x, p.values, None, p.pattern, "gelu", True
        )
        found["middle"] = lambda: _mlp.middle(
            p.dy, p.values, None, p.pattern, p.x, "gelu",
            sparse=True, dense=False, keep_a=True, need_bias=True,
        )  # fmt: skip
    return found


def run(cells: list[tuple]) -> None:
    for N, in_features, out_features, B, G, density in cells:
        p = Problem(N, in_features, out_features, B, G, density, torch.bfloat16)
        for name, product in products(p).items():
            product()
            torch.cuda.synchronize()
            label = f"{name}: {N}, {in_features} -> {out_features}, {B}x{G}, {density:.0%}"
            torch.cuda.cudart().cudaProfilerStart()
            torch.cuda.nvtx.range_push(label)
            product()
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_pop()
            torch.cuda.cudart().cudaProfilerStop()
            print("==CELL==", label, flush=True)


def table(path: str) -> None:
    """The kernels of every cell in the order they ran."""
    columns = ["kernel", *METRICS.values()]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file if line.startswith('"')]
    for row in csv.DictReader(lines):
        if not row["ID"]:
            continue  # the line of units
        name = row["Kernel Name"].split("(")[0][:40]
        values = [row.get(metric, "").replace(",", "") for metric in METRICS]
        print("| " + " | ".join([name, *(f"{float(v):.3g}" if v else "" for v in values)]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metrics", action="store_true", help="print the metrics' names")
    parser.add_argument("--table", help="a file of the profiler's output")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only the first so many")
    arguments = parser.parse_args()
    if arguments.metrics:
        print(",".join(METRICS))
    elif arguments.table:
        table(arguments.table)
    else:
        run(CELLS[: arguments.cells])


if __name__ == "__main__":
    main()
