"""Five tasks of two digits each, one after the other, in three settings.

    pip install scikit-learn
    python packages/cms-topology/benchmarks/bench_split_digits.py [--seeds 0 1 2 3 4]

The 8 x 8 digits of scikit-learn (UCI), 1,400 trained on, 397 the test set; two linear layers, 150
steps per task of AdamW at 2e-3. Settings (van de Ven & Tolias 2019): a head per task, known at the
test (task-incremental); one head of two outputs, "even" and "odd" (domain-incremental); one head of
ten outputs, without any data of earlier digits (class-incremental). Nothing is chosen on the test
set: defaults or round numbers for the settings of the guard.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

from cms_topology import Consolidation, RetentionGuard, consolidate

Batch = tuple[Tensor, Tensor, int]
TASKS = 5
OUTPUTS = {"task": 2, "domain": 2, "class": 10}
GUARDS: dict[str, dict[str, Any]] = {
    "trust region (default)": {},
    "damped updates": {"drift": None, "eps": 0.01},
    "damped gradients and updates": {"drift": None, "eps": 0.01, "gradients": True},
}


class Network(nn.Module):
    """A shared body, and one head or one per task."""

    def __init__(self, setting: str) -> None:
        super().__init__()
        self.setting = setting
        self.body = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()
        )  # fmt: skip
        heads = TASKS if setting == "task" else 1
        self.heads = nn.ModuleList([nn.Linear(128, OUTPUTS[setting]) for _ in range(heads)])

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Logits of pictures x [N, 64]."""
        head = self.heads[task if self.setting == "task" else 0]
        result: Tensor = head(self.body(x))
        return result


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    x, labels, task = batch
    return nn.functional.cross_entropy(model(x, task), labels)


class Data:
    """All tasks, split by a seed."""

    def __init__(self, setting: str, seed: int) -> None:
        digits = load_digits()
        self.x = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
        self.digits = torch.tensor(digits.target)
        self.labels = self.digits if setting == "class" else self.digits % 2
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.x), generator=self.generator)
        self.train, self.test = order[:1400], order[1400:]

    def _of(self, task: int, where: Tensor) -> Tensor:
        return where[self.digits[where] // 2 == task]

    def batches(self, task: int, count: int) -> Iterator[Batch]:
        """Random batches of 32 training pictures."""
        mine = self._of(task, self.train)
        for _ in range(count):
            chosen = mine[torch.randint(len(mine), (32,), generator=self.generator)]
            yield self.x[chosen], self.labels[chosen], task

    @torch.no_grad()
    def accuracy(self, model: nn.Module, task: int) -> float:
        """On the test set."""
        mine = self._of(task, self.test)
        right = model(self.x[mine], task).argmax(1) == self.labels[mine]
        return float(right.float().mean())


def run(setting: str, method: str, seed: int) -> tuple[float, float]:
    """Mean accuracy of the tasks just after each was trained, and of all at the end."""
    torch.manual_seed(seed)
    data, model = Data(setting, seed), Network(setting)
    memory: Consolidation | None = None
    learned = []
    for task in range(TASKS):
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        guard = None
        if memory is not None:
            guard = RetentionGuard(model, optimizer, memory, **GUARDS[method])
        for batch in data.batches(task, 150):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        if guard is not None:
            guard.remove()
        learned.append(data.accuracy(model, task))
        if method in GUARDS:
            known = data.batches(task, 10)
            memory = consolidate(model, known, str(task), loss_fn=loss_of, previous=memory)
    return statistics.mean(learned), statistics.mean(data.accuracy(model, t) for t in range(TASKS))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--settings", nargs="+", choices=OUTPUTS, default=list(OUTPUTS))
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, seeds {asked.seeds}\n")
    print("| setting | method | each when learned | all at the end |\n|---|---|---|---|")
    for setting in asked.settings:
        for method in ("fine-tuning", *GUARDS):
            found = zip(*(run(setting, method, seed) for seed in asked.seeds), strict=True)
            cells = [
                f"{statistics.mean(v):.1%}" + (f" ± {statistics.stdev(v):.1%}" if v[1:] else "")
                for v in found
            ]
            print(f"| {setting} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
