"""What retention costs: consolidation, building the guard, and time and memory per training step.

    python packages/cms-topology/benchmarks/bench_retention.py [--layers 16] [--tokens 8192]

One MLP of TitanMAC's shape (640 -> 2560 -> 640) per two layers, trained by fused AdamW, alone and
under a `RetentionGuard`. Times are medians; the correctness of what is timed is the business of the
tests. Prints a Markdown table, and with --json a line per row.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cms_topology import CMSBlockLinear, Consolidation, RetentionGuard, consolidate, make_probes

CONTROLS: dict[str, dict[str, Any]] = {
    "drift, every step": {"drift": 1e-3, "eps": math.inf, "every": 1},
    "drift, every 10": {"drift": 1e-3, "eps": math.inf, "every": 10},
    "drift + eps, every step": {"drift": 1e-3, "eps": 0.1, "every": 1},
    "drift + eps, every 10": {"drift": 1e-3, "eps": 0.1, "every": 10},
    "probes + eps, every 10": {"drift": "auto", "eps": 0.1, "every": 10},
}


class Block(nn.Module):
    """A transformer's MLP with its norm and residual, so that no number becomes denormal."""

    def __init__(self, make: Callable[[int, int], nn.Module], width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.fc1, self.fc2 = make(width, 4 * width), make(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def build(kind: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)

    def make(n: int, m: int) -> nn.Module:
        if kind == "dense":
            return nn.Linear(n, m, bias=False)
        tile, group = map(int, kind.split("/"))
        layer = CMSBlockLinear(n, m, False, tile_size=tile, density=0.5, row_group=group)
        layer.collect_candidates = False
        return layer

    return nn.Sequential(*(Block(make, args.width) for _ in range(args.layers // 2))).to(
        args.device
    )


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.roll(1, 1)).square().mean()


def seconds(run: Callable[[], object], args: argparse.Namespace, repeats: int) -> float:
    """Median seconds of a call, the device waited for."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def training_ms(model: nn.Module, control: dict[str, Any] | None, args: argparse.Namespace,
                memory: Consolidation, x: Tensor) -> tuple[float, float, int, float]:  # fmt: skip
    """Milliseconds per step over whole intervals, seconds to build the guard, its bytes, and the
    share of directions that it keeps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=args.device == "cuda")
    guard, built = None, 0.0
    if control is not None:
        started = time.perf_counter()
        guard = RetentionGuard(model, optimizer, memory, **control)
        if args.device == "cuda":
            torch.cuda.synchronize()
        built = time.perf_counter() - started

    def ten_steps() -> None:
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                loss = loss_of(model, x)
            loss.backward()
            optimizer.step()

    ten_steps()
    taken = seconds(ten_steps, args, args.repeats) * 100
    if guard is None:
        return taken, 0.0, 0, 0.0
    shapes = [batch.vectors.shape for batch in guard._batches]
    kept = sum(s[3] for s in shapes) / sum(s[2] for s in shapes)
    return taken, built, guard.num_bytes, kept


def measure(kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    model = build(kind, args)
    x = torch.randn(args.tokens, args.width, device=args.device)
    # inputs whose energy falls off as 1/j^2 over their directions, or not at all
    decay = torch.arange(1, args.width + 1, device=args.device) ** (0.0 if args.flat else -1.0)
    turn = torch.linalg.qr(torch.randn(args.width, args.width, device=args.device))[0]
    batches = [torch.randn(2048, args.width, device=args.device) * decay @ turn for _ in range(4)]
    started = time.perf_counter()
    probes = make_probes(model, batches[0], confidence=0.0)  # 2048 tokens, outputs as logits
    memory = consolidate(model, batches, loss_fn=loss_of, sensitivity_batches=0, probes=probes)
    consolidated_s = time.perf_counter() - started
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    plain, *_ = training_ms(model, None, args, memory, x)
    rows = []
    for name, control in CONTROLS.items():
        model.load_state_dict(state)
        taken, built, held, kept = training_ms(model, control, args, memory, x)
        rows.append(
            {
                "kind": kind, "control": name, "plain_ms": plain, "guarded_ms": taken,
                "extra_frac": taken / plain - 1, "consolidate_s": consolidated_s,
                "build_s": built, "weights_mb": weights / 2**20, "guard_mb": held / 2**20,
                "memory_mb": memory.num_bytes / 2**20, "directions_frac": kept,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="weight matrices (even)")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=["16/8", "16/1", "128/1", "dense"])
    parser.add_argument("--flat", action="store_true", help="consolidate on inputs of full rank")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="a JSON line per row, as they come")
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        for row in measure(kind, args):
            rows.append(row)
            if args.json:
                print(json.dumps(row), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    spectrum = "flat" if args.flat else "decaying"
    precision = "bf16 autocast" if args.amp else "float32"
    print(
        f"{args.layers} weight matrices {args.width} <-> {4 * args.width}, density 0.5, "
        f"{args.tokens} tokens, {spectrum} spectrum, {precision}; {device}, torch "
        f"{torch.__version__}, commit {commit}, {time.strftime('%Y-%m-%d')}\n"
    )
    print(
        "| tile/row group | control | step, ms | extra | directions | build, s | weights, MB | "
        "guard, MB | memory, MB |\n|---|---|---|---|---|---|---|---|---|"
    )
    for r in rows:
        print(
            f"| {r['kind']} | {r['control']} | {r['plain_ms']:.2f} | {r['extra_frac']:+.1%} | "
            f"{r['directions_frac']:.0%} | "
            f"{r['build_s']:.2f} | {r['weights_mb']:.0f} | {r['guard_mb']:.0f} | "
            f"{r['memory_mb']:.0f} |"
        )


if __name__ == "__main__":
    main()
