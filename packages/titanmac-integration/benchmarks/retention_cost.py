"""What a `RetentionGuard` costs a training step of a whole TitanMAC, in GPU time.

    python benchmarks/retention_cost.py --preset titanmac-163m --learned 0 300 --out out

The step is that of `step_time.py`: forward, backward and fused AdamW in bfloat16 autocast, replayed
from a CUDA graph. The guard's work on ten steps is queued while the GPU is held up, so that the
host does not count, and divided by ten steps without it. A model as it was born reads random
tokens: its inputs have more directions than those of a trained one, so the guard has more to do.
One that has learned for some steps reads prose. One JSON line per cell goes to
OUT/retention_cost.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graphed import WARM_UP, adamw, set_rate, training_step

from cms_topology import DriftController, RetentionGuard, consolidate, make_probes
from titanmac_integration import ProseTask, TitanMACConfig, create_titanmac_model

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    **{
        f"50%, tile {tile}": {
            "use_block_sparse": True,
            "block_sparse_tile_size": tile,
            "block_sparse_row_group": group,
            "block_sparse_layers": None,
            "block_sparse_density": 0.5,
        }
        for tile, group in ((128, 1), (16, 8))
    },
}


def half_logits(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Answers to probes in the precision of the step."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits: torch.Tensor = model(inputs)["logits"]
    return logits


CONTROLS: dict[str, dict[str, Any]] = {
    "probes + eps (default)": {"start": 1e-3},
    "probes in bfloat16": {"start": 1e-3, "logits_fn": half_logits},
    "budget binds": {"start": 2e-4, "target": 1e-9, "narrow": 0.95, "rate": 1e-2},
    "small budget": {"start": 1e-5, "target": 1e-9},
    "no probes": {"drift": 1e-3},
    "gradients too": {"start": 1e-3, "gradients": True},
}
"""Arguments of the guard. With ``start`` a budget that is steered by probes begins there; ``rate``
is the learning rate of the steps before. One that binds is narrowed at each look; a small one takes
products in full precision."""
STEERING = ("start", "narrow", "target")


def gpu_ms(run: Callable[[], object]) -> float:
    """GPU time of a call, the host left out."""
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


def wall_ms(run: Callable[[], object]) -> float:
    """Milliseconds of a call where there is no GPU, for a try."""
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def measure(kind: str, learned: int, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device, on_gpu = args.device, args.device == "cuda"
    clock = gpu_ms if on_gpu else wall_ms
    config = TitanMACConfig.preset(args.preset, **KINDS[kind])
    model = create_titanmac_model(config, device=device)
    for layer in model.block_sparse_layers.values():
        layer.collect_candidates = False
    optimizer = adamw([{"params": list(model.parameters())}], 3e-4, graph=on_gpu)
    train = training_step(
        model, optimizer, autocast=True, clip=None, graph=on_gpu, return_logits=False
    )
    data = batches(config.vocab_size, learned, args)
    for step in range(learned):
        train(*data[step % len(data)])
    data = data[:4]
    probes = make_probes(model, data[0][0].flatten()[:2048].view(-1, 64), confidence=0.0)
    began = time.perf_counter()
    memory = consolidate(
        model,
        [{"input_ids": tokens, "labels": labels} for tokens, labels in data],
        usage="none",
        sensitivity_batches=0,
        probes=probes,
    )
    consolidated_s = time.perf_counter() - began
    set_rate(optimizer, 1e-4)
    for _ in range(WARM_UP + 1):
        train(*data[0])
    step_ms = clock(lambda: train(*data[0]))
    for name in args.controls:
        settings = dict(CONTROLS[name])
        set_rate(optimizer, settings.pop("rate", 1e-4))
        steering = {key: settings.pop(key) for key in STEERING if key in settings}
        if steering:
            steering.setdefault("target", 1e3)
            settings["drift"] = DriftController(**steering, device=device)
        began = time.perf_counter()
        # its hooks would not be called by a step that is replayed
        guard = RetentionGuard(model, None, memory, eps=0.1, every=10, **settings)
        built_s = time.perf_counter() - began

        def ten_steps(guard: RetentionGuard = guard) -> None:
            for _ in range(10):
                guard.before_step()
                guard.step()

        for _ in range(WARM_UP):
            train(*data[0])
            ten_steps()
        guard_ms = clock(ten_steps)
        row = {
            "preset": args.preset,
            "kind": kind,
            "learned_steps": learned,
            "control": name,
            "tokens": data[0][0].numel(),
            "step_ms": round(step_ms, 3),
            "ten_guarded_ms": round(guard_ms, 3),
            "extra_frac": round(guard_ms / step_ms / 10, 4),
            "at_budget_frac": guard.metrics()["retention/layers_at_budget_frac"],
            "directions_frac": round(
                sum(b.vectors[0].numel() * len(b.vectors) for b in guard._batches)
                / sum(len(b.vectors) * b.vectors.shape[1] * b.vectors.shape[2] ** 2
                      for b in guard._batches), 3
            ),
            "guard_mib": guard.num_bytes >> 20,
            "memory_mib": memory.num_bytes >> 20,
            "parameters": model.num_parameters,
            "consolidate_s": round(consolidated_s, 1),
            "build_s": round(built_s, 1),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        with (args.out / "retention_cost.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        del guard


def batches(symbols: int, learned: int, args: argparse.Namespace) -> list[tuple[torch.Tensor, ...]]:
    """Random tokens for a model that has learned nothing, else prose: inputs and labels."""
    if learned == 0:
        shape = (args.batch_size, args.sequence)
        tokens = (torch.randint(symbols, shape, device=args.device) for _ in range(4))
        return [(some, some) for some in tokens]
    task, generator = ProseTask(), torch.Generator().manual_seed(0)
    found = (task.batch(args.batch_size, args.sequence, generator) for _ in range(64))
    return [(b.input_ids.to(args.device), b.labels.to(args.device)) for b in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="titanmac-163m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--learned", type=int, nargs="+", default=[0], help="steps before")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for kind, learned in itertools.product(args.kinds, args.learned):
        measure(kind, learned, args)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
