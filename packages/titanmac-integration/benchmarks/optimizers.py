"""Which optimizer wins: AdamW against slow levels, deep momentum, controller and meta-learning.

    python packages/titanmac-integration/benchmarks/optimizers.py --workers 24 --out runs.jsonl
    python packages/titanmac-integration/benchmarks/optimizers.py --table runs.jsonl

Equal effort: every method tries the same learning rates on a seed of its own. On sums, where runs
scatter, the two best are tried on two more. The one with the lowest held-out loss, or mean of it,
is then run on the evaluation seeds. All other settings are the defaults. One process per run, one
thread per process. Writes one JSON line per run; `--table` prints Markdown. Runs that the file
already holds are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from titanmac_integration import (
    ArithmeticTask,
    ContinuumMemorySystem,
    DeepMomentum,
    DeepNestedOptimizer,
    ProseTask,
    Task,
    TitanMACConfig,
    TrainingConfig,
    create_titanmac_model,
)

LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
TUNING_SEED = 100
MORE_TUNING_SEEDS = {"arithmetic": (101, 102), "prose": ()}
"""For the two best rates."""
TASKS: dict[str, tuple[type[Task], int]] = {
    "arithmetic": (ArithmeticTask, 500),
    "prose": (ProseTask, 400),
}
META_EVERY, META_STEPS = 20, 2


def _deep_mlps(level: int) -> Callable[[str, Any], int]:
    """MLPs of the second half of the layers on a slow level."""
    return lambda name, _: level if ".mlp." in name and "blocks.0." not in name else 0


METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "AdamW": dict,
    "levels": lambda: {"cms": ContinuumMemorySystem(PERIODS, _deep_mlps(1))},
    "levels, slow lr x 3": lambda: {
        "cms": ContinuumMemorySystem(PERIODS, _deep_mlps(1), lr_scales=(1, 3, 10))
    },
    "deep momentum": lambda: {"deep_momentum": True},
    "deep momentum, free length": lambda: {"deep_momentum": DeepMomentum(keep_length=False)},
    "controller": lambda: {"controller": True},
    "deep momentum + controller": lambda: {"deep_momentum": True, "controller": True},
    "both, meta-learned": lambda: {"deep_momentum": True, "controller": True},
}
PERIODS = (1, 10, 50)


@dataclass(frozen=True)
class Job:
    """One training run."""

    method: str
    task: str
    lr: float
    seed: int
    preset: str
    device: str
    scale: float
    """Factor on the number of steps."""


def run(job: Job) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(1)
    kind, steps = TASKS[job.task]
    steps = max(2, int(steps * job.scale))
    task = kind()
    config = TrainingConfig(batch_size=24, seq_len=64, lr=job.lr, warmup_steps=50, seed=job.seed)
    model = create_titanmac_model(
        TitanMACConfig.preset(job.preset), seed=job.seed, device=job.device
    ).train()
    cms = {"cms": ContinuumMemorySystem(PERIODS)}
    options = {**cms, **METHODS[job.method](), "topology": {"seed": job.seed}}
    optimizer = DeepNestedOptimizer(
        model, lr=job.lr, betas=(0.9, 0.98), weight_decay=0.0, **options
    )
    generator = torch.Generator().manual_seed(1000 + job.seed)

    def batch(n: int = config.batch_size) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = task.batch(n, config.seq_len, generator)
        return drawn.input_ids.to(job.device), drawn.labels.to(job.device)

    started, spent_in_step = time.perf_counter(), 0.0
    losses, rates = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step, steps)
        if job.method == "both, meta-learned" and step % META_EVERY == META_EVERY - 1:
            optimizer.meta_update(batch(8), [batch(8) for _ in range(META_STEPS)])
        loss = model(*batch())["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = time.perf_counter()
        optimizer.record_loss(loss)
        report = optimizer.step()
        spent_in_step += time.perf_counter() - before
        optimizer.zero_grad()
        losses.append(loss.item())
        if report.swap_rate is not None:
            rates.append(report.swap_rate)
    seconds = time.perf_counter() - started
    factors = optimizer.controller.factors if optimizer.controller is not None else None
    return {
        **asdict(job),
        "steps": steps,
        "held_out_loss": held_out_loss(model, task, job.device),
        "measure": task.evaluate(model),
        "train_loss": statistics.fmean(losses[-20:]),
        "swap_rates": [min(rates, default=None), max(rates, default=None)],
        "spikes": len(optimizer.spikes.spikes),
        "factors": factors,
        "seconds": seconds,
        "optimizer_share": spent_in_step / seconds,
    }


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, task: Task, device: str) -> float:
    """Mean loss in nats per counted token on the task's held-out data."""
    model.eval()
    if isinstance(task, ArithmeticTask):
        problems = task.encode(task.held_out_pairs).to(device)
        labels = problems.clone()
        labels[:, : task.prompt_length] = -100
    else:
        problems = task._validation.to(device)  # type: ignore[attr-defined]
        labels = problems
    loss = float(model(problems, labels)["loss"])
    model.train()
    return loss


def safely(job: Job) -> dict[str, Any]:
    try:
        return run(job)
    except Exception as error:  # one failed cell must not take the others with it
        return {**asdict(job), "error": f"{type(error).__name__}: {error}"}


def execute(pool: Any, jobs: Iterable[Job], out: Path) -> list[dict[str, Any]]:
    """Run the jobs not yet in `out`, the slow kinds first; append each result as it comes."""
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    fields = Job.__dataclass_fields__
    finished = {Job(**{name: row[name] for name in fields}): row for row in done}
    jobs = list(jobs)
    results = [finished[job] for job in jobs if job in finished]
    jobs = [job for job in jobs if job not in finished]
    ordered = sorted(jobs, key=lambda job: ("meta" not in job.method, "deep" not in job.method))
    with out.open("a", encoding="utf-8") as file:
        for result in pool.imap_unordered(safely, ordered):
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
            shown = result.get("error") or f"{result['held_out_loss']:.4f}"
            print(result["method"], result["task"], result["lr"], result["seed"], shown, flush=True)
    return results


def best_rates(
    results: Iterable[dict[str, Any]], *, number: int = 1, more: bool = True
) -> dict[tuple[str, str], list[float]]:
    """The learning rates of the lowest held-out loss, the best first, per method and task.

    Args:
        results: runs.
        number: how many rates.
        more: whether the mean over all tuning seeds counts, or the first seed alone.
    """
    losses: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for row in results:
        seeds = (TUNING_SEED, *(MORE_TUNING_SEEDS[row["task"]] if more else ()))
        # a loss that is not a number loses against everything
        if "error" not in row and row["seed"] in seeds and math.isfinite(row["held_out_loss"]):
            by_rate = losses.setdefault((row["method"], row["task"]), {})
            by_rate.setdefault(row["lr"], {})[row["seed"]] = row["held_out_loss"]
    best = {}
    for key, by_rate in losses.items():
        needed = 1 + len(MORE_TUNING_SEEDS[key[1]]) if more else 1
        known = sorted(
            (statistics.fmean(by_seed.values()), rate)
            for rate, by_seed in by_rate.items()
            if len(by_seed) == needed
        )
        best[key] = [rate for _, rate in known[:number]]
    return best


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the evaluation seeds, as Markdown."""
    best = best_rates(rows)
    lines = [
        "| task | method | lr | held-out loss, nats | measure |",
        "|---|---|---|---|---|",
    ]
    for name in TASKS:
        for method in METHODS:
            found = [
                r
                for r in rows
                if (r["method"], r["task"]) == (method, name)
                and r["seed"] not in (TUNING_SEED, *MORE_TUNING_SEEDS[name])
                and [r["lr"]] == best.get((method, name))
                and "error" not in r
            ]
            if not found:
                continue
            cells = [
                f"{statistics.fmean(v):.4f} ± {statistics.pstdev(v):.4f}"
                for v in ([r[k] for r in found] for k in ("held_out_loss", "measure"))
            ]
            (lr,) = best[method, name]
            lines.append(f"| {name} | {method} | {lr:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("optimizers.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps")
    parser.add_argument("--table", type=Path, help="print the table of a file and stop")
    args = parser.parse_args()
    if args.table is not None:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return
    cells = [(method, task) for method in args.methods for task in TASKS]
    fixed = {"preset": args.preset, "device": args.device, "scale": args.scale}
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        tuning = [
            Job(method, task, lr, TUNING_SEED, **fixed)
            for method, task in cells
            for lr in LEARNING_RATES
        ]
        rows = execute(pool, tuning, args.out)
        again = [
            Job(method, task, lr, seed, **fixed)
            for (method, task), rates in best_rates(rows, number=2, more=False).items()
            for lr in rates
            for seed in MORE_TUNING_SEEDS[task]
        ]
        rows += execute(pool, again, args.out)
        best = best_rates(rows)
        print(best, flush=True)
        final = [
            Job(method, task, lr, seed, **fixed)
            for method, task in cells
            for lr in best.get((method, task), [])
            for seed in args.seeds
        ]
        rows += execute(pool, final, args.out)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
