"""Where a training step's time goes: GPU time by kind of kernel and by part of the model.

    python benchmarks/step_parts.py --preset titanmac-163m --out out

A step is that of `step_time.py`: forward, backward and fused AdamW in bfloat16 autocast, replayed
from a CUDA graph; blocks stand still. Kinds are told by the kernels' names; parts are timed alone,
forward and backward. Kernels that run beside each other count in full. One JSON line per cell goes
to OUT/step_parts.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from graphed import WARM_UP, adamw, training_step

from titanmac_integration import TitanMAC, TitanMACConfig, create_titanmac_model
from titanmac_integration._attention._window import window_attention
from titanmac_integration._layers._linear_loss import linear_loss
from titanmac_integration._layers._losses import language_model_loss

KINDS = {
    "AdamW": ("adam", "fusedopti"),
    "attention": ("window_", "fmha", "flash", "attention", "mem_eff", "efficient", "sdpa"),
    "rotary": ("rotary_",),
    "softmax and loss": ("softmax", "nll", "cross_entropy", "loss"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitkreduce"),
    "residual and norms": ("norm_", "rms", "gammabeta"),
    "sums": ("bias_gradient", "sum_rows", "sum_parts", "reduce_kernel<128, 4"),
    "block-sparse": (
        *("block_", "blocks", "grad_values", "grad_input", "gradient_tiles", "reduce_parts"),
        *("by_turns", "by_pieces", "forward_", "few_", "strip", "walk", "swizzle", "pack_rows"),
    ),
    "GELU": ("gelu",),
    "copies and casts": ("copy", "memcpy", "memset", "fill"),
}


def kind(name: str) -> str:
    lower = name.lower()
    for label, words in KINDS.items():
        if any(word in lower for word in words):
            return label
    return "other"


def by_kernel(step: Callable[[], object], steps: int) -> list[tuple[str, float, int]]:
    """Name, milliseconds and launches per step, slowest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = [
        (event.key, event.self_device_time_total / 1e3 / steps, event.count // steps)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.key.startswith("Optimizer.")  # a range around kernels, not one of them
    ]
    return sorted(kernels, key=lambda kernel: -kernel[1])


def graph_ms(function: Callable[[], object], repeats: int = 10) -> float:
    """Milliseconds of one call, replayed from a graph."""
    return replay_ms(captured(function), repeats)


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of one call, replayed once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) / repeats, 3)


def forward_and_both(forward: Callable[[], object], both: Callable[[], object], runs: int) -> dict:
    """Milliseconds of a forward pass and of both passes (median of five), and MiB that both take.

    Each figure is the mean of ``runs`` replays of a CUDA graph.
    """
    both()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - base) >> 20
    graph = captured(both)
    times = sorted(replay_ms(graph, runs) for _ in range(5))
    return {
        "forward_ms": graph_ms(forward, runs),
        "both_ms": times[2],
        "both_lowest_ms": times[0],
        "both_highest_ms": times[-1],
        "peak_mib": peak,
    }


def forward_and_backward(
    function: Callable, inputs: list[torch.Tensor], weights: list[torch.Tensor]
) -> Callable[[], None]:
    def call() -> None:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            result = function(*inputs)
        torch.autograd.grad(result, inputs + weights, torch.ones_like(result), allow_unused=True)

    return call


def parts(model: TitanMAC, tokens: torch.Tensor) -> dict[str, float]:
    """Milliseconds of one layer's attention, MLP and norm, and of what is there once."""
    config = model.config
    rows = config.n_persistent + tokens.shape[1]
    shape = (tokens.shape[0], rows, config.d_model)
    x = torch.randn(shape, device="cuda", requires_grad=True)
    hidden = torch.randn(
        (tokens.shape[0], tokens.shape[1], config.d_model), device="cuda", requires_grad=True
    )
    block = model.blocks[0]
    run = model._pass(tokens.shape[1], None, False, x.device)
    qkv = [
        torch.randn(
            (tokens.shape[0], config.n_heads, rows, config.d_model // config.n_heads),
            device="cuda",
            dtype=torch.bfloat16,
            requires_grad=True,
        )
        for _ in range(3)
    ]

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return language_model_loss(model.logits(hidden), tokens, 0.0)["loss"]

    def whole(x: torch.Tensor) -> torch.Tensor:
        x, added, *_ = block(x, run)
        return added.plus(x)

    measured = {
        "attention": lambda x: block.attention(x, run)[0],
        "mlp": block.mlp,
        "norm": block.norm_mlp,
        "block": whole,
    }
    weights = list(block.parameters())
    times = {
        f"layer: {name}": graph_ms(forward_and_backward(function, [x], weights))
        for name, function in measured.items()
    }
    window = forward_and_backward(
        lambda q, k, v: window_attention(q, k, v, run.window, 0.0), qkv, []
    )
    times["layer: scores and values"] = graph_ms(window)
    table = [model.embedding.weight]
    times["head and loss"] = graph_ms(forward_and_backward(head, [hidden], table))
    for power in (28, 29, 30, 31):
        name = f"head and loss, {2**power >> 20} MiB of logits at a time"

        def in_chunks(hidden: torch.Tensor, power: int = power) -> torch.Tensor:
            weight = model.embedding.weight
            return linear_loss(hidden, weight, tokens, 0.0, chunk_bytes=2**power)["loss"]

        try:
            times[name] = graph_ms(forward_and_backward(in_chunks, [hidden], table))
        except RuntimeError as error:  # the other parts are worth having without it
            print(name, repr(error)[:300], flush=True)
    return times


def measure(config: TitanMACConfig, options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    model = create_titanmac_model(config, device="cuda")
    for layer in model.block_sparse_layers.values():
        layer.collect_candidates = False
    optimizer = adamw([{"params": list(model.parameters())}], 1e-4, graph=True)
    shape = (options.batch_size, options.sequence)
    tokens = torch.randint(config.vocab_size, shape, device="cuda")
    settings = {"autocast": True, "clip": None, "graph": True, "return_logits": options.logits}
    train = training_step(model, optimizer, **settings)
    for _ in range(WARM_UP):
        train(tokens, tokens)
    kernels = by_kernel(lambda: train(tokens, tokens), options.steps)
    kinds: dict[str, float] = defaultdict(float)
    for name, milliseconds, _ in kernels:
        kinds[kind(name)] += milliseconds
    optimizer.zero_grad()
    return {
        "kernels_ms": round(sum(kernel[1] for kernel in kernels), 2),
        "kinds_ms": {k: round(v, 3) for k, v in sorted(kinds.items(), key=lambda x: -x[1])},
        "parts_ms": parts(model, tokens),
        "slowest": [(name[:110], round(ms, 3), count) for name, ms, count in kernels[:40]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="titanmac-163m")
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.5])
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--logits", action="store_true", help="all logits at once")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for density in options.densities:
        changes: dict = {}
        if density < 1:
            changes = {
                "use_block_sparse": True,
                "block_sparse_tile_size": options.tile,
                "block_sparse_layers": None,
                "block_sparse_density": density,
            }
        row = {
            "preset": options.preset,
            "logits": options.logits,
            "density": density,
            "tile": options.tile if density < 1 else None,
            "batch_size": options.batch_size,
            "sequence": options.sequence,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        try:
            row.update(measure(TitanMACConfig.preset(options.preset, **changes), options))
        except Exception as error:  # one bad cell shall not cost the others
            row["error"] = repr(error)[:300]
        gc.collect()
        torch.cuda.empty_cache()
        for name, milliseconds, count in row.get("slowest", []):
            print(f"{milliseconds:9.3f} ms {count:5d} x {name}")
        print(json.dumps({k: v for k, v in row.items() if k != "slowest"}, indent=1), flush=True)
        with (options.out / "step_parts.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
