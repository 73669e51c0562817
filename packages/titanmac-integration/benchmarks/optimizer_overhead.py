"""What the clock costs: training steps with AdamW and with DeepNestedOptimizer, side by side.

    python packages/titanmac-integration/benchmarks/optimizer_overhead.py [--device cuda]

Every variant trains its own copy of the same model; they take turns in blocks of steps, so that a
slow moment of the machine hits all alike. Prints a Markdown table of medians over the blocks; the
last column is the difference of the host times in the optimizer, as a share of the base's step.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from cms_topology import TopologyManager
from titanmac_integration import (
    ContinuumMemorySystem,
    DeepNestedOptimizer,
    TitanMAC,
    TitanMACConfig,
    create_titanmac_model,
)


def deep_mlps(n_layers: int) -> Callable[[str, Any], int]:
    """MLPs of the second half of the layers on level 1."""
    slow = [f"blocks.{i}.mlp." for i in range(n_layers // 2, n_layers)]
    return lambda name, _: 1 if any(name.startswith(prefix) for prefix in slow) else 0


NAMES = [
    "torch AdamW",
    "all options off",
    "levels",
    "controller",
    "deep momentum",
    "torch AdamW + TopologyManager",
    "topology",
    "topology, levels",
]


class Variant:
    """A model, its optimizer, and what is called after a step."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        sizes: dict[str, Any] = {"use_block_sparse": True, "block_sparse_layers": None}
        if args.layers:
            sizes |= {"n_layers": args.layers, "vocab_size": args.vocabulary}
        self.config = TitanMACConfig.preset(args.preset, **sizes)
        self.model = create_titanmac_model(self.config, device=args.device).train()
        self.name, self.args = name, args
        self.manager: TopologyManager | None = None
        fused = {"fused": True} if args.device == "cuda" else {}
        if name.startswith("torch"):
            # the same groups as below: more groups are more launches, but not the clock's
            groups = DeepNestedOptimizer(self.model, topology=False).param_groups
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                [{k: g[k] for k in ("params", "weight_decay")} for g in groups], lr=1e-3, **fused
            )
            if name.endswith("TopologyManager"):
                self.manager = TopologyManager(self.model, self.optimizer)
            return
        levels = deep_mlps(self.config.n_layers) if "levels" in name else None
        self.optimizer = DeepNestedOptimizer(
            self.model,
            lr=1e-3,
            cms=ContinuumMemorySystem(levels=levels),
            topology="topology" in name,
            controller="controller" in name,
            deep_momentum="deep momentum" in name,
            **({} if "deep momentum" in name else fused),
        )

    def steps(self, count: int, tokens: torch.Tensor) -> tuple[float, float]:
        """Seconds per training step, and of host time in the optimizer per step."""
        half = torch.autocast("cuda", torch.bfloat16, enabled=self.args.device == "cuda")
        clock = time.process_time if self.args.cpu_time else time.perf_counter
        synchronise(self.args.device)
        started, inside = clock(), 0.0
        for _ in range(count):
            with half:
                loss = self.model(tokens, tokens)["loss"]
            loss.backward()
            before = clock()
            self.optimizer.step()
            if self.manager is not None:
                self.manager.step()
            inside += clock() - before
            self.optimizer.zero_grad()
        synchronise(self.args.device)
        return (clock() - started) / count, inside / count


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--layers", type=int, default=0, help="instead of the preset's")
    parser.add_argument("--vocabulary", type=int, default=256, help="together with --layers")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--block", type=int, default=100, help="steps of a variant in a row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="not wall time; for a busy machine, one thread"
    )
    parser.add_argument("--variants", nargs="+", default=NAMES, choices=NAMES)
    args = parser.parse_args()
    names = [name for name in NAMES if name in args.variants]
    variants = [Variant(name, args) for name in names]
    model: TitanMAC = variants[0].model
    tokens = torch.randint(model.config.vocab_size, (args.batch, args.length), device=args.device)
    for variant in variants:
        variant.steps(10, tokens)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(args.repeats):
        # forwards and backwards, so that a drift of the clock rate hits all alike
        for variant in variants if turn % 2 else reversed(variants):
            times[variant.name].append(variant.steps(args.block, tokens))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(
        f"{args.preset}, {model.num_parameters:,} parameters, {args.batch} x {args.length} tokens; "
        f"{device}, {torch.get_num_threads()} thread(s), "
        f"{'CPU time' if args.cpu_time else 'wall time'}, torch {torch.__version__}, commit "
        f"{commit}, {time.strftime('%Y-%m-%d')}\n"
    )
    print("| variant | training step, ms | in the optimizer, ms | step against base | clock |")
    print("|---|---|---|---|---|")
    medians = {
        name: [1e3 * statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in times.items()
    }
    for name, (step, inside) in medians.items():
        base = "torch AdamW + TopologyManager" if "topology" in name else "torch AdamW"
        # each block against the base's block of the same turn
        ratio = statistics.median(
            a[0] / b[0] for a, b in zip(times[name], times[base], strict=True)
        )
        clock = (inside - medians[base][1]) / medians[base][0]
        print(f"| {name} | {step:.3f} | {inside:.3f} | {ratio - 1:+.2%} | {clock:+.2%} |")


if __name__ == "__main__":
    main()
