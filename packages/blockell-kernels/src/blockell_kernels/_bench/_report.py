"""Results as rows: CSV, a Markdown table, a section of a file."""

from __future__ import annotations

import csv
import datetime
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from blockell_kernels._bench._cases import BenchCase
from blockell_kernels._bench._timing import Percentiles
from blockell_kernels.env import cpu_name, version_of


@dataclass(frozen=True)
class Row:
    """One contender on one case."""

    case: BenchCase
    contender: str
    chosen: str
    """Backends that ran, "forward" or "forward/grad_input/grad_values"; "" for others' code."""
    times: Percentiles
    speedup: float
    """nn.Linear's median over this one's; above 1 is faster than dense."""
    tflops: float = 0.0
    """Of the products it has to do: those with present blocks, or all of them if it is dense."""
    gb_per_s: float = 0.0
    """Of its operands and results, each read or written once."""
    ceiling_share: float = 0.0
    """Of the best time for that on this machine."""
    peak_mib: float | None = None
    """Memory beyond the operands."""
    host_us: float | None = None
    """Time after which a call returns on the host."""


@dataclass(frozen=True)
class Facts:
    """Where and when a table was measured."""

    device: str
    torch: str
    triton: str
    threads: int
    clock: str
    commit: str
    date: str


def facts(device: str, cpu_time: bool = False) -> Facts:
    """The facts of this process and machine, and of the clock used on it."""
    is_cuda = torch.device(device).type == "cuda"
    return Facts(
        device=torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        torch=torch.__version__,
        triton=version_of("triton") or "none",
        threads=torch.get_num_threads(),
        clock="device events" if is_cuda else "CPU time" if cpu_time else "wall time",
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    )


def _commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=10", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_csv(path: Path, rows: list[Row], facts: Facts) -> None:
    """One line per contender and case, the facts repeated on each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows:
            line = {
                **asdict(facts),
                **asdict(row.case),
                "dtype": str(row.case.dtype).removeprefix("torch."),
                "device": facts.device,
                "contender": row.contender,
                "chosen": row.chosen,
                **{name: f"{value:.4f}" for name, value in row.times._asdict().items()},
                "speedup": f"{row.speedup:.3f}",
                "tflops": f"{row.tflops:.4g}",
                "gb_per_s": f"{row.gb_per_s:.4g}",
                "ceiling_share": f"{row.ceiling_share:.3f}",
                "peak_mib": "" if row.peak_mib is None else f"{row.peak_mib:.1f}",
                "host_us": "" if row.host_us is None else f"{row.host_us:.1f}",
            }
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(line))
                writer.writeheader()
            writer.writerow(line)


def markdown(rows: list[Row], facts: Facts) -> str:
    """A table: per case nn.Linear's milliseconds and everybody's median and speed-up."""
    names = list(dict.fromkeys(row.contender for row in rows))
    columns = ["N", "in -> out", "tile", "row group", "density", "mode", *names, "chosen"]
    dtypes = sorted({str(row.case.dtype).removeprefix("torch.") for row in rows})
    lines = [
        f"{facts.device}, {facts.threads} CPU threads, {', '.join(dtypes)}, torch {facts.torch}, "
        f"{facts.clock}, commit {facts.commit}, {facts.date}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    by_case: dict[BenchCase, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.contender] = row
    for case, of in by_case.items():
        shape = f"{case.in_features} -> {case.out_features}"
        mode = case.mode if case.run == "eager" else f"{case.mode}, {case.run}"
        fixed = [case.tokens, shape, case.tile, case.row_group, f"{case.density:.0%}", mode]
        cells = [_cell(of.get(name)) for name in names]
        chosen = next((row.chosen for row in of.values() if row.chosen), "")
        lines.append("| " + " | ".join([*map(str, fixed), *cells, chosen]) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    p20, p50, p80 = (f"{value:.3g}" for value in row.times)
    return f"**{row.speedup:.2f}x** {p50} ({p20} to {p80})"


def update_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` in a file."""
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    content = path.read_text(encoding="utf-8")
    if content.count(start) != 1 or content.count(end) != 1:
        raise ValueError(f"{path} must hold the lines {start} and {end} once each; add them.")
    head, rest = content.split(start)
    tail = rest.split(end)[1]
    path.write_text(f"{head}{start}\n{text}{end}{tail}", encoding="utf-8")
