"""What retention costs: consolidation, building the guard, and time and memory per training step.

    python packages/cms-topology/benchmarks/bench_retention.py [--layers 16] [--tokens 8192]

One MLP of TitanMAC's shape (640 -> 2560 -> 640) per two layers, trained by fused AdamW, alone and
under a `RetentionGuard`. Times are medians; the correctness of what is timed is the business of the
tests. "GPU only" leaves out what the host needs, which an idle host hides behind the GPU's work.
Prints a Markdown table, and with --json a line per row.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cms_topology import (
    CMSBlockLinear,
    Consolidation,
    DriftController,
    RetentionGuard,
    consolidate,
    make_probes,
)

BUDGETS = {"auto": (1e3, 1e-3), "small": (1e-9, 1e-5)}
"""Target in nats and first budget of a controller: a budget that stays large, as it is after some
hundred steps, and one that stays small, whose products are taken in full precision."""


def in_bf16(model: nn.Module, inputs: Tensor) -> Tensor:
    """Answers to the probes by the same arithmetic as the training's."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        answers: Tensor = model(inputs)
    return answers


CONTROLS: dict[str, dict[str, Any]] = {
    "drift, every step": {"drift": 1e-3, "eps": math.inf, "every": 1},
    "drift, every 10": {"drift": 1e-3, "eps": math.inf, "every": 10},
    "drift + eps, every step": {"drift": 1e-3, "eps": 0.1, "every": 1},
    "drift + eps, every 10": {"drift": 1e-3, "eps": 0.1, "every": 10},
    "probes + eps, every 10": {"drift": "auto", "eps": 0.1, "every": 10},
    "gradients too": {"drift": "auto", "eps": 0.1, "every": 10, "gradients": True},
    "the same, small budget": {"drift": "small", "eps": 0.1, "every": 10},
    "the same, asked in bf16": {"drift": "auto", "eps": 0.1, "every": 10, "logits_fn": in_bf16},
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


def seconds(run: Callable[[], object], args: argparse.Namespace) -> float:
    """Seconds of a call, the device waited for."""
    started = time.perf_counter()
    run()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def gpu_ms(run: Callable[[], object]) -> float:
    """Milliseconds that the GPU itself is busy with a call of at most some hundred launches.

    The GPU is held up until the host has queued everything, so that a slow host does not count.
    """
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


class Training:
    """A model in training, with a guard or without.

    Args:
        control: settings of the guard; None: no guard.
    """

    def __init__(self, model: nn.Module, control: dict[str, Any] | None, memory: Consolidation,
                 x: Tensor, args: argparse.Namespace) -> None:  # fmt: skip
        self.model, self.x, self.args = model, x, args
        fused = args.device == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        self.guard, self.built_s = None, 0.0
        if control is not None:
            settings = dict(control)
            if settings["drift"] in BUDGETS:
                target, start = BUDGETS[settings["drift"]]
                settings["drift"] = DriftController(target, start=start, device=args.device)
            started = time.perf_counter()
            self.guard = RetentionGuard(model, self.optimizer, memory, **settings)
            if args.device == "cuda":
                torch.cuda.synchronize()
            self.built_s = time.perf_counter() - started

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.amp):
            loss = loss_of(self.model, self.x)
        loss.backward()
        self.optimizer.step()

    def ten_steps(self) -> None:
        for _ in range(10):
            self.step()

    def guard_ten_times(self) -> None:
        assert self.guard is not None
        for _ in range(10):
            self.guard.before_step()
            self.guard.step()


def measure(kind: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per control. Steps with and without the guard take turns, ten at a time, so that what
    else the host does falls on both; the extra time is the median of the turns' ratios."""
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
    for name in args.controls or CONTROLS:
        plain = Training(copy.deepcopy(model), None, memory, x, args)
        guarded = Training(copy.deepcopy(model), CONTROLS[name], memory, x, args)
        assert guarded.guard is not None
        turns = [
            (seconds(plain.ten_steps, args), seconds(guarded.ten_steps, args))
            for _ in range(args.repeats + 1)
        ][1:]
        extra = sorted(with_guard / without - 1 for without, with_guard in turns)
        shapes = [batch.vectors.shape for batch in guarded.guard._batches]
        on_gpu = None
        if args.device == "cuda":
            on_gpu = gpu_ms(guarded.guard_ten_times) / gpu_ms(plain.step) / 10
        yield {
            "kind": kind, "control": name, "plain_ms": statistics.median(t for t, _ in turns) * 100,
            "extra_frac": statistics.median(extra),
            "extra_quartiles": [extra[len(extra) // 4], extra[-1 - len(extra) // 4]],
            "extra_gpu_frac": on_gpu, "consolidate_s": consolidated_s, "build_s": guarded.built_s,
            "weights_mb": weights / 2**20, "guard_mb": guarded.guard.num_bytes / 2**20,
            "memory_mb": memory.num_bytes / 2**20,
            "directions_frac": sum(s[3] for s in shapes) / sum(s[2] for s in shapes),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="weight matrices (even)")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5, help="turns of ten steps each")
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, help="default: all")
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
        "| tile/row group | control | step, ms | extra (quartiles) | extra, GPU only | "
        "directions | build, s | weights, MB | guard, MB | memory, MB |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for r in rows:
        low, high = r["extra_quartiles"]
        on_gpu = "-" if r["extra_gpu_frac"] is None else f"{r['extra_gpu_frac']:+.1%}"
        print(
            f"| {r['kind']} | {r['control']} | {r['plain_ms']:.2f} | {r['extra_frac']:+.1%} "
            f"({low:+.1%} to {high:+.1%}) | {on_gpu} | "
            f"{r['directions_frac']:.0%} | "
            f"{r['build_s']:.2f} | {r['weights_mb']:.0f} | {r['guard_mb']:.0f} | "
            f"{r['memory_mb']:.0f} |"
        )


if __name__ == "__main__":
    main()
