"""Microseconds of host time per call: what an eager step waits for where computing costs nothing.

    python packages/cms-topology/benchmarks/bench_host.py [--repeats 200] [--csv FILE]

Tensors are tiny (32 tokens, 64 -> 64 features, tile 16), and the sparse layers' products are
replaced by an allocation, so what is left is Python and torch's dispatcher: the way from the layer
to the product and back, which all devices share. A GPU's launches are not in it. Process time of
one thread, best of `--repeats` loops: the rest is other people's work on the machine.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from blockell_kernels import _cpu
from blockell_kernels._backends import Backend, Case, Pattern, Verdict
from cms_topology import CMSBlockLinear, TopologyManager, block_sparse_mlp

TOKENS, WIDTH, TILE, MLPS = 32, 64, 16, 16


class Free(Backend):
    """Products that cost an allocation, in place of the CPU's."""

    name = "gathered"

    def verdict(self, case: Case) -> Verdict:
        return Verdict(True, "it costs nothing")

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
        return x.new_empty(x.shape[0], pattern.R * pattern.B)

    def grad_input(self, dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        return dy.new_empty(dy.shape[0], pattern.C * pattern.B)

    def grad_values(self, dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        return x.new_empty(pattern.R, pattern.slots, pattern.B, pattern.B)


def best_us(run: Callable[[], object], repeats: int, calls: int) -> float:
    """Microseconds of process time per call, of the best of `repeats` loops of `calls` calls."""
    for _ in range(20):
        run()
    times = []
    gc.disable()
    for _ in range(repeats):
        started = time.process_time()
        for _ in range(calls):
            run()
        times.append((time.process_time() - started) / calls)
    gc.enable()
    return 1e6 * min(times)


class MLP(nn.Module):
    """Two layers and the GELU between them, fused where they are sparse."""

    def __init__(self, make: Callable[[], nn.Module], fused: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fused = make(), make(), fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return block_sparse_mlp(x, self.fc1, self.fc2)
        y: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return y


def dense() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def sparse() -> nn.Module:
    layer = CMSBlockLinear(WIDTH, WIDTH, tile_size=TILE, density=0.5)
    layer.collect_candidates = False  # as in all but the steps before a decision
    return layer


def modules() -> dict[str, nn.Module]:
    return {
        "nn.Linear": dense(),
        "CMSBlockLinear": sparse(),
        "dense MLP": MLP(dense, fused=False),
        "sparse MLP, layer by layer": MLP(sparse, fused=False),
        "sparse MLP, fused": MLP(sparse, fused=True),
    }


def calls_of(module: nn.Module) -> dict[str, Callable[[], object]]:
    x, dy = torch.randn(2, TOKENS // 2, WIDTH), torch.randn(2, TOKENS // 2, WIDTH)
    x_grad = x.clone().requires_grad_()
    parameters = list(module.parameters())

    def inference() -> None:
        with torch.no_grad():
            module(x)

    def training() -> None:
        torch.autograd.backward(module(x_grad), dy)
        x_grad.grad = None
        for p in parameters:
            p.grad = None

    return {"no_grad": inference, "forward": lambda: module(x_grad), "forward+backward": training}


def manager_step() -> Callable[[], object]:
    """A step of the clock of 16 MLPs on which nothing is decided."""
    model = nn.Sequential(*(MLP(sparse, fused=True) for _ in range(MLPS)))
    optimizer = torch.optim.AdamW(model.parameters())
    manager = TopologyManager(model, optimizer, periods=(1, 10, 10**9))
    model(torch.randn(TOKENS, WIDTH)).sum().backward()
    optimizer.step()
    return manager.step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--csv", type=Path, help="append the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    _cpu.BACKEND = Free()
    torch.manual_seed(0)
    measured: list[tuple[str, str, float]] = []
    for name, module in modules().items():
        for what, run in calls_of(module).items():
            measured.append((name, what, best_us(run, args.repeats, args.calls)))
    step = best_us(manager_step(), args.repeats, max(1, args.calls // 4))
    measured.append((f"TopologyManager.step, {MLPS} MLPs", "no decision", step))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, commit {commit}\n")
    print("| what | call | us |\n|---|---|---|")
    for name, what, us in measured:
        print(f"| {name} | {what} | {us:.1f} |")
    if args.csv is not None:
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(("commit", "torch", "what", "call", "us"))
            for name, what, us in measured:
                writer.writerow((commit, torch.__version__, name, what, f"{us:.1f}"))


if __name__ == "__main__":
    main()
