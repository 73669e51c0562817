"""Does it cost anything to go on exploring? `demo` with floors under its swap rate.

Every variant sees the same batches in the same order from the same initial weights and topology.

    python benchmarks/exploration.py --jobs 12 --out out

One JSON line per run goes to OUT/exploration.jsonl: held-out loss in nats per token that counts,
swap rate of every decision, and how many losses the detector flagged. For `small` on a GPU see
`lm_sanity.py --scoring`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from titanmac_integration import (
    ContinuumMemorySystem,
    DeepNestedOptimizer,
    TitanMACConfig,
    TrainingConfig,
    create_titanmac_model,
    make_task,
)
from titanmac_integration._data._arithmetic import IGNORE_INDEX, ArithmeticTask

DECIDE_EVERY = 50
SCHEDULE = TrainingConfig(lr=3e-3, warmup_steps=100, batch_size=24, seq_len=64)


class Variant(NamedTuple):
    """How blocks move."""

    scoring: dict[str, Any] | None
    """Fields of ScoringConfig; None: blocks stand still. The preset's own are by magnitude, from
    zero, with a floor of 1%; its threshold, 1.1, is that of all."""
    until: float = 1.0
    """No decision after this share of the steps."""


RULES = {
    "by gradient": {"keep_score": "gradient", "birth": "kaiming"},
    "by gradient, from zero": {"keep_score": "gradient", "birth": "zeros"},
    # RigL's: drop by magnitude, grow by gradient from zero
    "by magnitude, from zero": {"keep_score": "magnitude", "birth": "zeros"},
}
VARIANTS = {"fixed": Variant(None)}
for (_rule, _scoring), _floor, _until in itertools.product(RULES.items(), (0, 1, 2), (1.0, 0.75)):
    _name = _rule + (f", floor {_floor}%" if _floor else "") + (", to 75%" if _until < 1 else "")
    VARIANTS[_name] = Variant({**_scoring, "min_swap_frac": _floor / 100}, _until)


class Cell(NamedTuple):
    variant: str
    task: str
    seed: int


def held_out(task: Any) -> tuple[Tensor, Tensor]:
    """Tokens and labels that training never sees."""
    if isinstance(task, ArithmeticTask):
        tokens = task.encode(task.held_out_pairs)
        labels = tokens.clone()
        labels[:, : task.prompt_length] = IGNORE_INDEX
        return tokens, labels
    text = task.validation_tokens
    starts = torch.linspace(0, len(text) - SCHEDULE.seq_len, 1024).long()
    tokens = text[starts[:, None] + torch.arange(SCHEDULE.seq_len)].long()
    return tokens, tokens


@torch.no_grad()
def loss_on(model: nn.Module, tokens: Tensor, labels: Tensor) -> float:
    model.eval()
    total, count = 0.0, 0
    for part, wanted in zip(tokens.split(128), labels.split(128), strict=True):
        logits = model(part)["logits"][:, :-1]
        targets = wanted[:, 1:]
        total += float(functional.cross_entropy(logits.mT, targets, reduction="sum"))
        count += int((targets != IGNORE_INDEX).sum())
    model.train()
    return total / count


def run_cell(cell: Cell, steps: int) -> dict[str, Any]:
    variant = VARIANTS[cell.variant]
    task = make_task(cell.task)
    model = create_titanmac_model(TitanMACConfig.preset("demo"), seed=cell.seed).train()
    for layer in model.block_sparse_layers.values():
        layer.scorer.config = dataclasses.replace(layer.scorer.config, **(variant.scoring or {}))
        layer.collect_candidates = False
    moves = {"seed": cell.seed, "freeze_after": int(variant.until * steps)}
    optimizer = DeepNestedOptimizer(
        model,
        lr=SCHEDULE.lr,
        betas=(SCHEDULE.beta1, SCHEDULE.beta2),
        weight_decay=0.0,
        cms=ContinuumMemorySystem((1, 10, DECIDE_EVERY)),
        topology=False if variant.scoring is None else moves,
    )
    data = torch.Generator().manual_seed(cell.seed)
    test = held_out(task)
    rates: list[float] = []
    curve: list[tuple[int, float]] = []
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = SCHEDULE.lr_at(step, steps)
        batch = task.batch(SCHEDULE.batch_size, SCHEDULE.seq_len, data)
        loss = model(batch.input_ids, batch.labels)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), SCHEDULE.grad_clip)
        optimizer.record_loss(loss.detach())
        report = optimizer.step()
        optimizer.zero_grad()
        if report.swap_rate is not None:
            rates.append(round(report.swap_rate, 4))
        if (step + 1) % (steps // 4) == 0:
            curve.append((step + 1, round(loss_on(model, *test), 5)))
    optimizer.spikes.flush()
    ratios = [round(ratio, 3) for _, ratio in optimizer.spikes.ratios]
    return {
        **cell._asdict(),
        "steps": steps,
        "held_out_loss": curve[-1][1],
        "curve": curve,
        "measure": round(task.evaluate(model), 5),
        "swap_rates": rates,
        "spikes": len(optimizer.spikes.spikes),
        "largest_ratio": max(ratios, default=None),
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
    }


def work(arguments: tuple[Cell, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    try:
        return run_cell(*arguments)
    except Exception as error:  # one bad cell shall not cost the others
        return {**arguments[0]._asdict(), "error": repr(error)[:500]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--tasks", nargs="+", default=["arithmetic", "prose"])
    parser.add_argument("--steps", nargs="+", type=int, default=[1200, 1600], help="per task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    steps = dict(zip(options.tasks, options.steps, strict=True))
    jobs = [
        (Cell(variant, task, seed), steps[task])
        for seed, task, variant in itertools.product(options.seeds, options.tasks, options.variants)
    ]
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(options.jobs) as pool, (options.out / "exploration.jsonl").open("a") as file:
        for row in pool.imap_unordered(work, jobs, chunksize=1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps({k: v for k, v in row.items() if k != "swap_rates"}), flush=True)


if __name__ == "__main__":
    main()
