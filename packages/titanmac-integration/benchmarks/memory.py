"""One layer's neural memory: the kernels against torch's operators.

    python benchmarks/memory.py --out out

Forward, and forward and backward, replayed from a CUDA graph; projections included. First the error
of the outputs and gradients of both against double precision. One JSON line per cell goes to
OUT/memory.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from step_parts import forward_and_both

import titanmac_integration
from titanmac_integration import NeuralMemory, TitanMACConfig

CELLS = [
    # variant, depth, batch, tokens, d_model, width, chunk, half precision
    ("MAC", 1, 8, 1024, 640, 64, 64, True),  # titanmac-163m
    ("MAG", 1, 8, 1024, 640, 64, 64, True),
    ("MAG", 1, 8, 1024, 640, 64, 64, False),
    ("MAG", 1, 16, 512, 384, 64, 64, True),  # small
    ("MAG", 1, 1, 8192, 640, 64, 64, True),
    ("MAG", 1, 8, 1024, 640, 32, 64, True),
    ("MAG", 1, 8, 1024, 640, 128, 64, True),
    ("MAG", 1, 8, 1024, 640, 128, 64, False),  # from here on the recurrence by operators both times
    ("MAG", 1, 8, 1024, 640, 256, 64, True),
    ("MAG", 2, 8, 1024, 640, 64, 64, True),
]
PARTS = ("_answers", "_chunked", "_module", "_tokens")


@contextmanager
def by_torch() -> Iterator[None]:
    """The memory in torch's operators."""
    patches = [
        patch(f"titanmac_integration._memory.{part}.on_gpu", lambda *_, **__: False)
        for part in PARTS
    ]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def outputs_and_gradients(
    memory: NeuralMemory, x: torch.Tensor, grads: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """With ``grads`` of the outputs, or always the same random ones."""
    said = memory(x)
    outputs = [said.read] if said.retrieved is None else [said.read, said.retrieved]
    if grads is None:
        generator = torch.Generator().manual_seed(1)
        shape = outputs[0].shape
        grads = [torch.randn(shape, generator=generator).to(output) for output in outputs]
    leaves = [leaf for leaf in (x, *memory.parameters()) if leaf.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def largest_error(memory: NeuralMemory, x: torch.Tensor, half: bool) -> float:
    """Of outputs and gradients against double precision, relative to the size of each."""
    few = x[:1, :512].detach().requires_grad_()
    exact = outputs_and_gradients(
        copy.deepcopy(memory).double(), few.detach().double().requires_grad_()
    )
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        found = outputs_and_gradients(memory, few)
    pairs = zip(found, exact, strict=True)
    return max(
        float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())
        for got, wanted in pairs
    )


def measure(memory: NeuralMemory, x: torch.Tensor, half: bool) -> dict:
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
        said = memory(x)
        grads = [torch.randn_like(y) for y in (said.read, said.retrieved) if y is not None]

    def both() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
            outputs_and_gradients(memory, x, grads)

    def forward() -> None:
        with (
            torch.no_grad(),
            torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False),
        ):
            said = memory(x)
            _ = said.read

    return forward_and_both(forward, both, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    names = ("variant", "depth", "batch", "tokens", "d_model", "width", "chunk", "half")
    for cell in CELLS:
        row = dict(zip(names, cell, strict=True))
        config = TitanMACConfig(
            d_model=row["d_model"],
            n_heads=10 if row["d_model"] == 640 else 6,
            use_neural_memory=True,
            titans_variant=row["variant"],
            memory_depth=row["depth"],
            memory_width=row["width"],
            memory_chunk_size=row["chunk"],
        )
        generator = torch.Generator().manual_seed(0)
        memory = NeuralMemory(config, generator=generator).cuda()
        shape = (row["batch"], row["tokens"], row["d_model"])
        x = torch.randn(shape, generator=generator).cuda().requires_grad_()
        for way in ("operators", "kernels"):
            found = {**row, "way": way}
            try:
                with by_torch() if way == "operators" else nullcontext():
                    found["error"] = largest_error(memory, x, row["half"])
                    if found["error"] > (0.05 if row["half"] else 1e-4):
                        raise ValueError(f"errs by {found['error']}")
                    found.update(measure(memory, x, row["half"]))
            except Exception as error:  # one bad cell shall not cost the others
                found["failed"] = repr(error)[:200]
            found.update(
                device=torch.cuda.get_device_name(),
                torch=torch.__version__,
                version=titanmac_integration.__version__,
            )
            gc.collect()
            torch.cuda.empty_cache()
            print(json.dumps(found), flush=True)
            with (options.out / "memory.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
