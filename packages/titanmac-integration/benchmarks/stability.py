"""Ten thousand steps: does the loss jump when the topology changes, and how many blocks swap?

    python packages/titanmac-integration/benchmarks/stability.py --preset demo --out stability.json

Trains one preset with DeepNestedOptimizer's defaults on prose. The run is cut into pieces: after
each the state is saved and loaded into a new model and optimizer: the resume is part of the test.
Writes the largest loss ratio within ten steps of every decision, the swap rates, and a thinned loss
curve. `docs/images/stability.py` draws it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from titanmac_integration import (
    ContinuumMemorySystem,
    DeepNestedOptimizer,
    TitanMACConfig,
    TrainingConfig,
    create_titanmac_model,
    make_task,
)


def build(args: argparse.Namespace, seed: int) -> tuple[Any, DeepNestedOptimizer]:
    model = create_titanmac_model(
        TitanMACConfig.preset(args.preset, **args.fields), seed=seed, device=args.device
    ).train()
    optimizer = DeepNestedOptimizer(
        model,
        lr=args.lr,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=args.device == "cuda",
        cms=ContinuumMemorySystem((1, 10, args.decide_every)),
    )
    return model, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--fields", type=json.loads, default={}, help="fields to replace, JSON")
    parser.add_argument("--task", default="prose")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--pieces", type=int, default=5)
    parser.add_argument("--decide-every", type=int, default=50)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=Path("stability.json"))
    args = parser.parse_args()

    schedule = TrainingConfig(lr=args.lr, warmup_steps=args.warmup, batch_size=args.batch)
    task = make_task(args.task)
    data = torch.Generator().manual_seed(args.seed)
    model, optimizer = build(args, args.seed)
    scratch = Path(tempfile.mkdtemp()) / "state.pt"
    half = torch.autocast("cuda", torch.bfloat16, enabled=args.device == "cuda")
    losses: list[torch.Tensor] = []
    curve, swaps = [], []
    started, resumed = time.perf_counter(), []
    for step in range(args.steps):
        if step and step % (args.steps // args.pieces) == 0:
            torch.save([model.state_dict(), optimizer.state_dict(), data.get_state()], scratch)
            model, optimizer = build(args, seed=args.seed + 1)
            weights, state, generator = torch.load(scratch, weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            data.set_state(generator)
            resumed.append(step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step, args.steps)
        batch = task.batch(args.batch, args.length, data)
        with half:
            loss = model(batch.input_ids.to(args.device), batch.labels.to(args.device))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.record_loss(loss)
        report = optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if report.swap_rate is not None:
            swaps.append([report.step, report.swap_rate])
        if len(losses) == 20:
            curve.append([step + 1, float(torch.stack(losses).mean())])
            losses.clear()
        if (step + 1) % 500 == 0:
            seconds = time.perf_counter() - started
            print(step + 1, f"{curve[-1][1]:.4f}", swaps[-1], f"{seconds:.0f} s", flush=True)
            write(args, optimizer, curve, swaps, resumed, seconds, task.evaluate(model))
            if seconds > args.max_seconds:
                break


def write(
    args: argparse.Namespace,
    optimizer: DeepNestedOptimizer,
    curve: list[Any],
    swaps: list[Any],
    resumed: list[int],
    seconds: float,
    measure: float,
) -> None:
    optimizer.spikes.flush()
    cuda = args.device == "cuda"
    result = {
        "preset": args.preset,
        "fields": args.fields,
        "task": args.task,
        "lr": args.lr,
        "steps": optimizer.global_step,
        "resumed_at": resumed,
        "seconds": seconds,
        "measure": measure,
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "torch": torch.__version__,
        "loss": curve,
        "swap_rates": swaps,
        "loss_ratios": optimizer.spikes.ratios,
        "spikes": [list(spike) for spike in optimizer.spikes.spikes],
    }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
