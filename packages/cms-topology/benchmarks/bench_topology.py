"""What the topology costs: the three levels of the clock beside a training step.

    python packages/cms-topology/benchmarks/bench_topology.py [--layers 8] [--tokens 2048]

One MLP of TitanMAC's shape (640 -> 2560 -> 640) per two layers. Times are medians; the correctness
of what is timed is the business of the tests. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from torch import nn

from cms_topology import CMSBlockLinear, ScoringConfig, TopologyManager


def median_ms(
    run: Callable[[], object],
    args: argparse.Namespace,
    before: Callable[[], object] = lambda: None,
) -> float:
    """Median time of `run`; `before` runs ahead of each, and is not counted."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = []
    for i in range(args.repeats + 2):
        before()
        if args.device == "cuda":
            torch.cuda.synchronize()
        started = clock()
        run()
        if args.device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(1e3 * (clock() - started))
    return statistics.median(times)


class Block(nn.Module):
    """A transformer's MLP with its norm and residual, so that no number becomes denormal."""

    def __init__(self, density: float, scoring: ScoringConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(640)
        self.fc1 = CMSBlockLinear(640, 2560, density=density, scoring=scoring)
        self.fc2 = CMSBlockLinear(2560, 640, density=density, scoring=scoring)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def measure(candidate_score: str, args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    scoring = ScoringConfig(candidate_score=candidate_score)
    blocks = [Block(args.density, scoring) for _ in range(args.layers // 2)]
    model = nn.Sequential(*blocks).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    manager = TopologyManager(model, optimizer)
    x = torch.randn(args.tokens, 640, device=args.device)
    sparse = list(manager.layers.values())

    def backward(sampling: bool) -> Callable[[], None]:
        def run() -> None:
            for layer in sparse:
                layer.collect_candidates = sampling
            optimizer.zero_grad()
            model(x).square().sum().backward()

        return run

    def time_of(run: Callable[[], object]) -> float:
        return median_ms(run, args)

    plain = time_of(backward(False))
    sampled = time_of(backward(True))
    optimizer_step = time_of(optimizer.step)

    def level_0() -> None:
        manager._step = 0  # step 1: only level 0 is due
        manager.step()

    for layer in sparse:  # as old as the optimizer, whose steps above no manager has seen
        layer.scorer.block_age.fill_(int(optimizer.state[layer.values]["step"]))
    every = median_ms(level_0, args, optimizer.step)
    for layer in sparse:
        layer.collect_candidates = True
    backward(True)()
    manager.step()
    fold = time_of(lambda: [layer.score_step() for layer in sparse])
    decide = time_of(manager._decide)
    # many blocks are young now, and the steps of all of them are corrected
    many_young = median_ms(level_0, args, optimizer.step)
    for layer in sparse:
        layer.scorer.block_age.fill_(1)
    all_young = median_ms(level_0, args, optimizer.step)
    samples = 1 if candidate_score == "gradient" else 10
    step = plain + optimizer_step
    rest = 10 * fold + decide + samples * max(0.0, sampled - plain)
    per_100 = 100 * many_young + rest
    at_worst = 100 * all_young + rest
    return {
        "forward + backward, ms": plain,
        "optimizer step, ms": optimizer_step,
        "level 0 (every step), ms": every,
        "the same, after nine decisions, ms": many_young,
        "the same, every block young, ms": all_young,
        "level 1 (every 10), ms": fold,
        "level 2 (every 100), ms": decide,
        "one sampled backward pass, extra ms": sampled - plain,
        "share of training at the default periods": per_100 / (100 * step + per_100),
        "share, every block young": at_worst / (100 * step + at_worst),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="sparse layers (even)")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--cpu-time", action="store_true", help="not wall time; for a busy machine, one thread"
    )
    args = parser.parse_args()
    columns = {kind: measure(kind, args) for kind in ("gradient", "outer")}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(
        f"{args.layers} layers of 640 <-> 2560, tile 16, density {args.density}, {args.tokens} "
        f"tokens; {device}, {torch.get_num_threads()} thread(s), "
        f"{'CPU time' if args.cpu_time else 'wall time'}, torch {torch.__version__}, commit "
        f"{commit}, {time.strftime('%Y-%m-%d')}\n"
    )
    print("| | `gradient` | `outer` |\n|---|---|---|")
    for row, value in columns["gradient"].items():
        cells = [value, columns["outer"][row]]
        style = "{:.2%}" if row.startswith("share") else "{:.2f}"
        print(f"| {row} | " + " | ".join(style.format(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
