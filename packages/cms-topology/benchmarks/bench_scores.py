"""Which scores serve training: validation loss of a small language model per kind of score.

    python packages/cms-topology/benchmarks/bench_scores.py TEXT_FILE [--seeds 4] [--steps 1500]

A character transformer whose linear layers are all block-sparse. The same seed gives the same
initial weights, topology and batches to every kind; "static" never swaps. Prints a Markdown table:
mean and standard deviation over seeds, and the mean difference to static with its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cms_topology import ScoringConfig, TopologyManager, sparsify

KINDS: dict[str, dict[str, str] | None] = {
    "static": None,
    "keep gradient, candidate gradient": {},
    "keep gradient, candidate outer": {"candidate_score": "outer"},
    "keep magnitude, candidate gradient": {"keep_score": "magnitude"},
    "keep taylor, candidate gradient": {"keep_score": "taylor"},
    "loss (nats)": {"keep_score": "loss", "candidate_score": "loss"},
}
CONTEXT = 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        S, T, d = x.shape
        parts = self.qkv(self.norm1(x)).view(S, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(S, T, d))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, symbols: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x) + self.positions)))


def batch(data: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    start = torch.randint(len(data) - CONTEXT - 1, (size,), generator=generator)
    rows = data[start[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def run(job: tuple[str, int, dict[str, Any]]) -> dict[str, Any]:
    kind, seed, options = job
    torch.set_num_threads(1)
    text = Path(options["text"]).read_text(encoding="utf-8")
    symbols = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([symbols[c] for c in text])
    train, held_out = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    torch.manual_seed(seed)
    model = Model(len(symbols), options["width"], options["layers"])
    settings = KINDS[kind]
    sparsify(
        model, density=options["density"], row_group=1, include="blocks.*",
        scoring=ScoringConfig(**(settings or {})),  # type: ignore[arg-type]
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=options["lr"])
    manager = TopologyManager(
        model, optimizer, periods=(1, 10, options["period"]), seed=seed,
        freeze_after=0 if settings is None else int(0.75 * options["steps"]),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1000 + seed)
    rates = []
    for step in range(options["steps"]):
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / options["steps"]))
        for group in optimizer.param_groups:
            group["lr"] = options["lr"] * rate
        optimizer.zero_grad()
        loss_of(model, *batch(train, options["batch"], generator)).backward()
        optimizer.step()
        report = manager.step()
        if report.swap_rate is not None:
            rates.append(report.swap_rate)
    generator.manual_seed(0)
    model.eval()
    with torch.no_grad():
        losses = [float(loss_of(model, *batch(held_out, 64, generator))) for _ in range(20)]
    return {
        "kind": kind,
        "seed": seed,
        "loss": statistics.mean(losses),
        "swap_rate": statistics.mean(rates) if rates else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a text file of half a million characters or more")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--period", type=int, default=50, help="steps between decisions")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    args = parser.parse_args()
    jobs = [(kind, seed, vars(args)) for seed in range(args.seeds) for kind in KINDS]
    results: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for found in pool.imap_unordered(run, jobs):
            print(json.dumps(found), flush=True)
            results[found["kind"]][found["seed"]] = found
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        f"\n{args.layers} layers of width {args.width}, density {args.density}, tile 16, "
        f"{args.steps} steps, {args.seeds} seeds; torch {torch.__version__}, commit {commit}, "
        f"{time.strftime('%Y-%m-%d')}\n\n| scores | loss, nats | beside static | swap rate |\n"
        "|---|---|---|---|"
    )
    static = {seed: found["loss"] for seed, found in results["static"].items()}
    for kind, found in results.items():
        losses = [f["loss"] for f in found.values()]
        gains = [f["loss"] - static[seed] for seed, f in found.items()]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        rate = statistics.mean(f["swap_rate"] for f in found.values())
        print(
            f"| {kind} | {statistics.mean(losses):.4f} ± {spread:.4f} | "
            f"{statistics.mean(gains):+.4f} ± {error:.4f} | {rate:.1%} |"
        )


if __name__ == "__main__":
    main()
