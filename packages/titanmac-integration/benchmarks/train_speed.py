"""What the training loop itself takes, dense and block-sparse: data, clipping, clock and all.

    python benchmarks/train_speed.py --preset small --out out
    python benchmarks/train_speed.py --preset titanmac-163m --precision bf16 --graphs both --out out

Trains on prose by `Trainer`, as `titanmac train` does; blocks of the sparse MLPs move. The models
take turns, a decision period each, after a first one that is not counted, so that a host that is
busy for a while is busy for all. The loss is read after every step: its time is the device's, too.
One JSON line per model goes to OUT/train_speed.jsonl: milliseconds of a step, tokens per second,
peak memory (of a GPU), the bound that multiply-adds set, last loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import torch
from step_time import multiply_adds

from titanmac_integration import (
    ProseTask,
    TitanMACConfig,
    Trainer,
    TrainingConfig,
    create_titanmac_model,
)

KINDS = {"no": (False,), "yes": (True,), "both": (False, True)}


class Times:
    """Milliseconds between the steps of one call of `fit`."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_fit_start(self, *_: object) -> None:
        self.marks = [time.perf_counter()]

    def on_step(self, *_: object) -> None:
        self.marks.append(time.perf_counter())

    def milliseconds(self, skipped: int) -> list[float]:
        pairs = itertools.pairwise(self.marks[skipped:])
        return [1e3 * (after - before) for before, after in pairs]


def sparse(options: argparse.Namespace, density: float) -> dict[str, Any]:
    return {
        "use_block_sparse": True,
        "block_sparse_tile_size": options.tile,
        "block_sparse_row_group": options.row_group,
        "block_sparse_layers": None,
        "block_sparse_density": density,
    }


def make(
    options: argparse.Namespace, changes: dict[str, Any], graph: bool
) -> tuple[Trainer, Times, float]:
    base = {"use_block_sparse": False, "use_neural_memory": False}
    config = TitanMACConfig.preset(options.preset, **{**base, **changes})
    settings = TrainingConfig(
        batch_size=options.batch_size,
        seq_len=min(options.sequence, config.max_seq_len),
        precision=options.precision,
        lr=1e-4,
        level_periods=(1, 10, options.period),
        cuda_graph=graph,
    )
    times = Times()
    model = create_titanmac_model(config, device=options.device)
    bound, rest = multiply_adds(config)
    return Trainer(model, settings, callbacks=[times]), times, bound / rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--row-group", type=lambda t: t if t == "auto" else int(t), default="auto")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.5, 0.25])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--period", type=int, default=100, help="steps between decisions")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--graphs", choices=sorted(KINDS), default="no", help="CUDA graphs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    models = [("dense", {}), *((f"{d:.0%}", sparse(options, d)) for d in options.densities)]
    task = ProseTask()
    cells = {
        (name, graph): make(options, changes, graph)
        for (name, changes), graph in itertools.product(models, KINDS[options.graphs])
    }
    measured: dict[tuple[str, bool], list[float]] = {cell: [] for cell in cells}
    reports = {}
    for turn in range(options.turns + 1):
        for cell, (trainer, times, _) in cells.items():
            # a graph is captured anew at every call of `fit`: in the first steps of it, and one for
            # steps that collect statistics before the second decision
            skipped = 2 * options.period if cell[1] else 0
            reports[cell] = trainer.fit(task, options.period + skipped)
            if turn:
                measured[cell] += times.milliseconds(skipped)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    with (options.out / "train_speed.jsonl").open("a") as file:
        for (name, graph), times_ms in measured.items():
            trainer, _, bound = cells[name, graph]
            cuts = quantiles(times_ms, n=10)
            tokens = options.batch_size * trainer.config.seq_len
            base = mean(measured["dense", graph])
            row = {
                "model": name,
                "graph": graph,
                "p20_ms": round(cuts[1], 2),
                "p50_ms": round(cuts[4], 2),
                "p80_ms": round(cuts[7], 2),
                "mean_ms": round(mean(times_ms), 2),
                "speed_up": round(base / mean(times_ms), 3),
                "bound": round(bound, 3),
                "tokens_per_s": round(1e3 * tokens / mean(times_ms)),
                "peak_mib": reports[name, graph].peak_memory_bytes >> 20,
                "topology_host_frac": round(reports[name, graph].topology_frac, 4),
                "final_loss": round(reports[name, graph].final_loss, 3),
                "preset": options.preset,
                "precision": options.precision,
                "shape": [options.batch_size, trainer.config.seq_len],
                "tile": [options.tile, options.row_group],
                "period": options.period,
                "device": device,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    main()
