"""What moving blocks cost: steps whose blocks stand still before, between and after a hundred steps
with the clock, a decision among them.

    python benchmarks/topology_clock.py --preset titanmac-163m --out out

A step is that of `step_time.py`, half of all MLPs' blocks in one tile; on a GPU it is replayed from
a CUDA graph, or not with `--eager`, where only the host's share says something. The launches and
kernels of level 0 and of a decision are counted by torch's profiler (on a CPU operators take their
place). One JSON line goes to OUT/clock.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import torch
from graphed import adamw, training_step
from torch.profiler import ProfilerActivity, profile

from cms_topology import TopologyManager
from titanmac_integration import TitanMACConfig, create_titanmac_model

PERIODS = (1, 10, 100)
TURN = 30


def step_ms(function: Callable[[], object], steps: int, on_gpu: bool) -> list[float]:
    """Milliseconds of each call; on a GPU by its own clock, while the host runs ahead."""
    if not on_gpu:
        times = [time.perf_counter()]
        for _ in range(steps):
            function()
            times.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in itertools.pairwise(times)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def kernels(function: Callable[[], object], on_gpu: bool) -> tuple[float, int]:
    """Milliseconds and number of the kernels that a call launches."""
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    with profile(activities=[activity]) as profiler:
        function()
        if on_gpu:
            torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == wanted]
    spent = sum(e.time_range.elapsed_us() if on_gpu else e.self_cpu_time_total for e in events)
    return round(spent / 1e3, 3), len(events)


def measure(options: argparse.Namespace, on_gpu: bool) -> dict[str, object]:
    config = TitanMACConfig.preset(
        options.preset,
        use_block_sparse=True,
        use_neural_memory=False,
        block_sparse_tile_size=options.tile,
        block_sparse_row_group=options.row_group,
        block_sparse_layers=None,
        block_sparse_density=0.5,
    )
    model = create_titanmac_model(config, device="cuda" if on_gpu else "cpu")
    graph = on_gpu and not options.eager
    optimizer = adamw([{"params": list(model.parameters())}], 1e-4, graph=graph)
    for layer in model.block_sparse_layers.values():
        layer.collect_candidates = False
    shape = (options.batch_size, options.sequence)
    tokens = torch.randint(config.vocab_size, shape, device=next(model.parameters()).device)
    train = training_step(
        model, optimizer, autocast=on_gpu, clip=None, graph=graph, return_logits=False
    )
    manager = TopologyManager(model, optimizer, periods=PERIODS)

    def fixed() -> None:
        train(tokens, tokens)

    def moving() -> None:
        train(tokens, tokens)
        manager.step()

    def still() -> list[float]:
        """Steps without the clock, which are as if they had not been: blocks age by the clock."""
        steps = [state["step"] for state in optimizer.state.values()]
        before = [step.clone() for step in steps]
        times = step_ms(fixed, TURN, on_gpu)
        torch._foreach_copy_(steps, before)
        return times

    def until(place: int) -> None:
        while manager.global_step % PERIODS[-1] != place:
            moving()

    until(99)  # once around: kernels are loaded and memory is there
    moving()
    fixed()
    level_0 = kernels(manager.step, on_gpu)
    until(99)
    fixed()
    decision = kernels(manager.step, on_gpu)
    plain, level_0_steps, decisions, pairs = [], [], [], []
    host = 0.0
    for _ in range(options.turns):
        until(1)
        alone = still()
        before = manager.overhead_seconds
        around = step_ms(moving, PERIODS[-1], on_gpu)  # the last but one decides
        host += manager.overhead_seconds - before
        alone += still()
        pairs.append(round(mean(around) / mean(alone) - 1, 4))
        plain += alone
        level_0_steps += around[:-2]
        decisions.append(around[-2])
    steps = options.turns * PERIODS[-1]
    return {
        "fixed_p50_ms": round(median(plain), 3),
        "fixed_mean_ms": round(mean(plain), 3),
        "level_0_p50_ms": round(median(level_0_steps), 3),
        "level_0_mean_ms": round(mean(level_0_steps), 3),
        "decision_step_ms": round(median(decisions), 3),
        "moving_fracs": pairs,
        "host_ms_per_step": round(1e3 * host / steps, 3),
        "host_frac": round(1e3 * host / steps / mean(level_0_steps), 4),
        "level_0_kernels_ms": level_0[0],
        "level_0_launches": level_0[1],
        "decision_kernels_ms": decision[0],
        "decision_launches": decision[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="titanmac-163m")
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--row-group", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    row = {
        "preset": options.preset,
        "tile": options.tile,
        "graph": on_gpu and not options.eager,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        **measure(options, on_gpu),
    }
    print(json.dumps(row), flush=True)
    with (options.out / "clock.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
