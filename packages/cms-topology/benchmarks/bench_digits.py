"""Does a network forget? Handwritten digits, then the same turned by 90 degrees.

    pip install scikit-learn
    python packages/cms-topology/benchmarks/bench_digits.py [--body convolutions] [--seeds 0 1 2]

Task A: the 8 x 8 digits of scikit-learn (UCI). Task B: the same pictures turned and their labels
permuted, with a head of its own. The body is shared: convolutions, depthwise separable ones, an
LSTM or a transformer's encoder that reads the picture line by line, or linear layers. Every method
starts from the same network after A. 1,400 pictures are trained on, 397 are the test set; nothing
is chosen on them: AdamW at 2e-3, defaults or round numbers for the settings of the guard.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

from cms_topology import RetentionGuard, consolidate

Batch = tuple[Tensor, Tensor, int]
BODIES = ("convolutions", "depthwise", "lstm", "transformer", "linear")
HELD = "convolutions or LSTM held still"
GUARDS: dict[str, dict[str, Any]] = {
    "trust region (default)": {},
    "damped updates": {"drift": None, "eps": 0.01},
    "damped gradients and updates": {"drift": None, "eps": 0.01, "gradients": True},
}


class Lines(nn.Module):
    """Reads a picture [N, 1, 8, 8] line by line: [N, 128]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "lstm":
            self.reader: nn.Module = nn.LSTM(8, 128, batch_first=True)
        else:
            layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
            self.into, self.out = nn.Linear(8, 64), nn.Linear(64, 128)
            self.position = nn.Parameter(0.1 * torch.randn(8, 64))
            self.reader = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        lines = x.flatten(0, 1)
        if isinstance(self.reader, nn.LSTM):
            last: Tensor = self.reader(lines)[0][:, -1]
            return last
        read = self.reader(self.into(lines) + self.position)
        result: Tensor = self.out(read.mean(1)).relu()
        return result


def separable(c: int, m: int, stride: int) -> nn.Sequential:
    """A depthwise and a pointwise convolution, as in MobileNet, without its batch norms."""
    depthwise = nn.Conv2d(c, c, 3, padding=1, stride=stride, groups=c)
    return nn.Sequential(depthwise, nn.Conv2d(c, m, 1), nn.ReLU())


def body(kind: str) -> nn.Module:
    """What all tasks share: [N, 1, 8, 8] -> [N, 128]."""
    if kind == "convolutions":
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, 128), nn.ReLU(),
        )  # fmt: skip
    if kind == "depthwise":
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            separable(32, 64, 2), separable(64, 128, 2),
            nn.Flatten(), nn.Linear(512, 128), nn.ReLU(),
        )  # fmt: skip
    if kind == "linear":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()
        )
    return Lines(kind)


class Network(nn.Module):
    """A shared body and a head per task."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = body(kind)
        self.heads = nn.ModuleList([nn.Linear(128, 10), nn.Linear(128, 10)])

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Logits [N, 10] of pictures x [N, 1, 8, 8]."""
        result: Tensor = self.heads[task](self.body(x))
        return result


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    x, labels, task = batch
    return nn.functional.cross_entropy(model(x, task), labels)


class Data:
    """Both tasks, split by a seed."""

    def __init__(self, seed: int) -> None:
        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(digits.target)
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=self.generator)
        renamed = torch.randperm(10, generator=self.generator)[labels]
        self.tasks = [(x[order], labels[order]), (x.rot90(1, (2, 3))[order], renamed[order])]

    def batches(self, task: int, count: int) -> Iterator[Batch]:
        """Random batches of 64 training pictures."""
        x, labels = self.tasks[task]
        for _ in range(count):
            chosen = torch.randint(1400, (64,), generator=self.generator)
            yield x[chosen], labels[chosen], task

    @torch.no_grad()
    def accuracy(self, model: nn.Module, task: int) -> float:
        """On the test set."""
        x, labels = self.tasks[task]
        return float((model(x[1400:], task).argmax(1) == labels[1400:]).float().mean())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def run(kind: str, method: str, seed: int) -> tuple[float, float, float, float]:
    """Accuracy of A after A, after B, at its lowest on the way, and of B."""
    torch.manual_seed(seed)
    data, model = Data(seed), Network(kind)
    train(model, torch.optim.AdamW(model.parameters(), 2e-3), data.batches(0, 300))
    learned = data.accuracy(model, 0)
    memory = consolidate(copy.deepcopy(model), data.batches(0, 20), "a", loss_fn=loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    if method == HELD:
        for layer in model.body.modules():
            if isinstance(layer, (nn.Conv2d, nn.LSTM)):
                layer.requires_grad_(False)
    if method != "fine-tuning":
        RetentionGuard(model, optimizer, memory, **GUARDS.get(method, {}))
    lowest = learned
    for _ in range(20):
        train(model, optimizer, data.batches(1, 20))
        lowest = min(lowest, data.accuracy(model, 0))
    return learned, data.accuracy(model, 0), lowest, data.accuracy(model, 1)


def main() -> None:
    """Print a Markdown table: means, and the worst of the lowest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--body", choices=BODIES, default=BODIES[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {asked.body}, seeds {asked.seeds}\n")
    print("| method | A learned | A at the end | lowest | B |\n|---|---|---|---|---|")
    held = () if asked.body in ("transformer", "linear") else (HELD,)
    for method in ("fine-tuning", *held, *GUARDS):
        found = list(zip(*(run(asked.body, method, seed) for seed in asked.seeds), strict=True))
        cells = [f"{statistics.mean(v):.1%} ± {statistics.stdev(v):.1%}" for v in found]
        cells[2] = f"{min(found[2]):.1%}"
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
