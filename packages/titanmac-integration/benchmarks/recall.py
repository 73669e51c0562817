"""Associative recall beyond the attention's reach: does the neural memory remember?

A sequence is a list of pairs (key, value), then filler, then the keys again in another order. The
model must name each key's value. The filler is longer than what window attention can carry through
all layers, so without a memory nothing better than guessing a value is possible.

    python benchmarks/recall.py --variants none MAC MAG MAL --seeds 0 1 2 --steps 1500 --out out

One JSON line per run goes to OUT/recall.jsonl; `--jobs N` runs N processes at a time, `--together`
all runs in one process, each on its own stream of the GPU: models this small leave most of it idle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from graphed import adamw, set_rate, training_step

from titanmac_integration import TitanMACConfig, create_titanmac_model

KEYS, VALUES, PAIRS = 16, 16, 6
WINDOW, LAYERS = 16, 2
FILLER_TOKEN = KEYS + VALUES
FILLER = 48  # tokens; attention alone carries information over LAYERS * (WINDOW - 1) = 30
IGNORED = -100


def config(variant: str, depth: int, chunk: int) -> TitanMACConfig:
    return TitanMACConfig(
        vocab_size=KEYS + VALUES + 1,
        d_model=64,
        n_heads=4,
        n_layers=LAYERS,
        d_ff=256,
        max_seq_len=4 * PAIRS + FILLER,
        window_size=WINDOW,
        n_persistent=2,
        use_neural_memory=variant != "none",
        titans_variant="MAC" if variant == "none" else variant,
        segment_size=WINDOW,
        memory_heads=2,
        memory_width=32,
        memory_depth=depth,
        memory_chunk_size=chunk,
    )


def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [size, T]; only the values asked for count."""
    on = {"generator": generator, "device": generator.device}
    keys = torch.rand(size, KEYS, **on).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (size, PAIRS), **on) + KEYS
    shown = torch.stack((keys, values), dim=2).flatten(1)
    order = torch.rand(size, PAIRS, **on).argsort(1)
    asked = torch.stack((keys.gather(1, order), values.gather(1, order)), dim=2).flatten(1)
    filler = torch.full((size, FILLER), FILLER_TOKEN, device=keys.device)
    tokens = torch.cat((shown, filler, asked), dim=1)
    labels = torch.full_like(tokens, IGNORED)
    first = 2 * PAIRS + FILLER
    labels[:, first + 1 :: 2] = tokens[:, first + 1 :: 2]
    return tokens, labels


class Run:
    """One model and its training, a step at a time."""

    def __init__(self, variant: str, seed: int, options: argparse.Namespace) -> None:
        self.variant, self.seed, self.options = variant, seed, options
        self.model = create_titanmac_model(
            config(variant, options.depth, options.chunk), seed=seed, device=options.device
        )
        groups = [{"params": list(self.model.parameters())}]
        self.optimizer = adamw(groups, options.lr, graph=options.graph, weight_decay=0.01)
        self.generator = torch.Generator(options.device).manual_seed(1000 + seed)
        self.held_out = [batch(512, torch.Generator(options.device).manual_seed(7))]
        self.one_step = training_step(
            self.model, self.optimizer, autocast=False, graph=options.graph
        )
        self.curve: list[tuple[int, float]] = []
        self.started = time.perf_counter()

    def advance(self, step: int) -> None:
        """Step number ``step``, counted from 1."""
        options, size = self.options, self.options.batch_size
        warm, cold = step / 100, 2 * (1 - step / options.steps)
        set_rate(self.optimizer, options.lr * min(1.0, warm, max(0.02, cold)))
        at = (step - 1) % 50 * size
        if at == 0:
            self.tokens, self.labels = batch(50 * size, self.generator)
        loss = self.one_step(self.tokens[at : at + size], self.labels[at : at + size])
        if step % options.every == 0 or step == options.steps:
            self.curve.append((step, round(accuracy(self.model, self.held_out), 4)))
            shown = f"{loss.item():.3f} {self.curve[-1][1]}"
            print(self.variant, self.seed, step, shown, flush=True)
            if step % options.write_every == 0 or step == options.steps:
                self.write()

    def write(self) -> None:
        options = self.options
        result = {
            "variant": self.variant,
            "chance": 1 / VALUES,
            "depth": options.depth if self.variant != "none" else None,
            "seed": self.seed,
            "steps": options.steps,
            "done": self.curve[-1][0],
            "lr": options.lr,
            "batch_size": options.batch_size,
            "parameters": self.model.num_parameters,
            "accuracy": self.curve[-1][1],
            "curve": self.curve,
            "seconds": round(time.perf_counter() - self.started, 1),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        }
        with (options.out / "recall.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


def train(variant: str, seed: int, options: argparse.Namespace) -> None:
    run = Run(variant, seed, options)
    for step in range(1, options.steps + 1):
        run.advance(step)


def train_together(cells: list[tuple[int, str]], options: argparse.Namespace) -> None:
    """All cells at once; each has its own stream, the host gives them their steps in turn."""
    runs = []
    for seed, variant in cells:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            runs.append((stream, Run(variant, seed, options)))
        torch.cuda.synchronize()
    for step in range(1, options.steps + 1):
        for stream, run in runs:
            with torch.cuda.stream(stream):
                run.advance(step)


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: list) -> float:
    right = total = 0
    model.eval()
    for tokens, labels in batches:
        predicted = model(tokens)["logits"][:, :-1].argmax(-1)
        counted = labels[:, 1:] != IGNORED
        right += int((predicted == labels[:, 1:])[counted].sum())
        total += int(counted.sum())
    model.train()
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["none", "MAC", "MAG", "MAL"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--graph", action="store_true", help="one CUDA graph per step")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--together", action="store_true", help="one process, a stream per run")
    parser.add_argument("--write-every", type=int, default=500, help="steps; the last line counts")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cells = list(itertools.product(options.seeds, options.variants))
    if options.together:
        train_together(cells, options)
        return
    if len(cells) == 1 or options.jobs == 1:
        for seed, variant in cells:
            try:
                train(variant, seed, options)
            except Exception as error:  # one bad cell shall not cost the others
                print("FAILED", variant, seed, repr(error)[:500], flush=True)
        return
    running: list[subprocess.Popen] = []
    for seed, variant in cells:
        while len([p for p in running if p.poll() is None]) >= options.jobs:
            time.sleep(0.2)
        arguments = [sys.executable, __file__, "--variants", variant, "--seeds", str(seed)]
        for name in (
            "steps",
            "every",
            "batch_size",
            "lr",
            "depth",
            "chunk",
            "device",
            "out",
            "write_every",
        ):
            arguments += ["--" + name.replace("_", "-"), str(getattr(options, name))]
        arguments += ["--graph"] if options.graph else []
        running.append(subprocess.Popen(arguments))
    for process in running:
        process.wait()


if __name__ == "__main__":
    main()
