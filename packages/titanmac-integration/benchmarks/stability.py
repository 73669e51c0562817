"""Ten thousand steps: does the loss jump when the topology changes, and how many blocks swap?

    python packages/titanmac-integration/benchmarks/stability.py --preset demo --out stability.json

Trains one preset with DeepNestedOptimizer's defaults on prose, or on another text (`--text`;
`stdlib` is the source of Python's standard library). The run is cut into pieces: after
each the state is saved and loaded into a new model and optimizer: the resume is part of the test.
With `--state FILE` a run that `--max-seconds` ended goes on where it stopped. `--frozen` is the
control: the topology stands still; losses are looked at at the same steps. `--graph` replays
loss and gradients from a CUDA graph: models this small are bound by their launches. `--tf32` lets
products round to TF32.
Writes the largest loss ratio within ten steps of every decision, the swap rates, and a thinned loss
curve. `docs/images/stability.py` draws it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from texts import load_text

from cms_topology import GraphedBackward
from titanmac_integration import (
    ContinuumMemorySystem,
    DeepNestedOptimizer,
    ProseTask,
    TitanMACConfig,
    TrainingConfig,
    create_titanmac_model,
    make_task,
)


def gradients_of(model: torch.nn.Module, graphed: bool) -> Callable[..., torch.Tensor]:
    """A function of inputs and labels that leaves clipped gradients and returns the loss."""

    def eager(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(inputs, labels)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss.detach()

    return GraphedBackward(eager, model) if graphed else eager


def build(args: argparse.Namespace, seed: int) -> tuple[Any, DeepNestedOptimizer]:
    model = create_titanmac_model(
        TitanMACConfig.preset(args.preset, **args.fields), seed=seed, device=args.device
    ).train()
    for layer in model.block_sparse_layers.values():
        layer.scorer.config = dataclasses.replace(layer.scorer.config, **args.scoring)
    optimizer = DeepNestedOptimizer(
        model,
        lr=args.lr,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=args.device == "cuda",
        cms=ContinuumMemorySystem((1, 10, args.decide_every)),
        topology=False if args.frozen else {"freeze_after": int(args.decide_until * args.steps)},
    )
    return model, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--fields", type=json.loads, default={}, help="fields to replace, JSON")
    parser.add_argument("--scoring", type=json.loads, default={}, help="fields of ScoringConfig")
    parser.add_argument("--task", default="prose")
    parser.add_argument("--text", help="instead of the task: a file, or stdlib")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--pieces", type=int, default=5)
    parser.add_argument("--decide-every", type=int, default=50)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--decide-until", type=float, default=1.0, help="share of the steps")
    parser.add_argument("--state", type=Path, help="continue from this file, and write it")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=Path("stability.json"))
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    schedule = TrainingConfig(lr=args.lr, warmup_steps=args.warmup, batch_size=args.batch)
    if args.text is None:
        task = make_task(args.task)
    else:
        args.task = Path(args.text).stem
        task = ProseTask(load_text(args.text).decode(errors="replace"))
    data = torch.Generator().manual_seed(args.seed)
    model, optimizer = build(args, args.seed)
    state_file = args.state or Path(tempfile.mkdtemp()) / "state.pt"
    losses: list[torch.Tensor] = []
    record: dict[str, Any] = {"loss": [], "swap_rates": [], "resumed_at": [], "seconds": 0.0}
    begin = 0
    if state_file.exists():
        model, optimizer, record = load(args, state_file, data)
        begin = optimizer.global_step
    backward = gradients_of(model, args.graph)
    started = time.perf_counter() - record["seconds"]
    limit = record["seconds"] + args.max_seconds
    for step in range(begin, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step, args.steps)
        batch = task.batch(args.batch, args.length, data)
        # a blocking copy would wait for the steps before
        tokens, labels = (
            x.to(args.device, non_blocking=True) for x in (batch.input_ids, batch.labels)
        )
        loss = backward(tokens, labels)
        optimizer.record_loss(loss)
        report = optimizer.step()
        optimizer.zero_grad()
        if args.frozen and 2 in report.due_levels:
            optimizer.spikes.decided(report.step)
        losses.append(loss)
        if report.swap_rate is not None:
            record["swap_rates"].append([report.step, report.swap_rate])
        if len(losses) == 20:
            record["loss"].append([step + 1, float(torch.stack(losses).mean())])
            losses.clear()
        if (step + 1) % 200 == 0:
            record["seconds"] = time.perf_counter() - started
            shown = f"{record['loss'][-1][1]:.4f} {record['swap_rates'][-1:]}"
            print(step + 1, shown, f"{record['seconds']:.0f} s", flush=True)
            ended = record["seconds"] > limit or step + 1 == args.steps
            resume = (step + 1) % (args.steps // args.pieces) == 0
            if ended or resume or (step + 1) % 1000 == 0:
                write(args, optimizer, record, task.evaluate(model))
                save(state_file, model, optimizer, data, record)
            if ended:
                break
            if resume:
                model, optimizer, record = load(args, state_file, data)
                backward = gradients_of(model, args.graph)


def save(
    path: Path,
    model: torch.nn.Module,
    optimizer: DeepNestedOptimizer,
    data: torch.Generator,
    record: dict[str, Any],
) -> None:
    state = [model.state_dict(), optimizer.state_dict(), data.get_state(), record]
    torch.save(state, path)


def load(
    args: argparse.Namespace, path: Path, data: torch.Generator
) -> tuple[Any, DeepNestedOptimizer, dict[str, Any]]:
    """The state in a new model, which was built from another seed, and a new optimizer."""
    model, optimizer = build(args, seed=args.seed + 1)
    weights, state, generator, record = torch.load(path, weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    data.set_state(generator)
    record["resumed_at"].append(optimizer.global_step)
    return model, optimizer, record


def write(
    args: argparse.Namespace, optimizer: DeepNestedOptimizer, record: dict[str, Any], measure: float
) -> None:
    optimizer.spikes.flush()
    cuda = args.device == "cuda"
    result = {
        "preset": args.preset,
        "fields": args.fields,
        "scoring": args.scoring,
        "task": args.task,
        "lr": args.lr,
        "steps": optimizer.global_step,
        "tf32": args.tf32,
        "seed": args.seed,
        "batch": args.batch,
        "length": args.length,
        "frozen": args.frozen,
        "decide_until": args.decide_until,
        "measure": measure,
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "torch": torch.__version__,
        **record,
        "loss_ratios": optimizer.spikes.ratios,
        "spikes": [list(spike) for spike in optimizer.spikes.spikes],
    }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
