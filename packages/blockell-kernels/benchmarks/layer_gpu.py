"""What a training step of one layer costs besides its products: launches, memory, index.

    python layer_gpu.py --out results/h200-layer.csv

Rows of kind "launch": wall time of one eager forward and backward pass (its Python and launches;
the products are small) and the same as one CUDA graph. "memory": peak of one training step with
AdamW, parameters, gradients and optimizer state included, and what the weight alone takes (values,
gradient, indices). "index": the transposed index, rebuilt in place on the device. Every row has the
dense layer's figure beside it.
"""

from __future__ import annotations

import argparse
import csv
import gc
import time
from pathlib import Path

import torch
from grid_gpu import header
from tune_gpu import median_ms

from blockell_format import create_random_topology, transposed_index
from blockell_kernels import block_ell_linear
from blockell_kernels._backends import MAX_LOOKED_THROUGH
from blockell_kernels._triton import _blocks

FIELDS = ["kind", "what", "N", "in", "out", "B", "row_group", "density", "unit", "ours", "dense"]
DEVICE = torch.device("cuda")


class Layer(torch.nn.Module):
    """The operator with parameters of its own."""

    def __init__(self, in_features, out_features, B, G, density, dtype=torch.bfloat16):
        super().__init__()
        R, self.C = out_features // B, in_features // B
        K = max(1, round(density * self.C))
        generator = torch.Generator().manual_seed(0)
        self.cols = create_random_topology(R, self.C, K, generator=generator, row_group=G)
        self.cols, self.G = self.cols.to(DEVICE), G
        self.index = transposed_index(self.cols, self.C)
        self.values = torch.nn.Parameter(torch.randn(R, K, B, B, device=DEVICE, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(out_features, device=DEVICE, dtype=dtype))

    def forward(self, x):
        return block_ell_linear(
            x, self.values, self.cols, self.bias, row_group=self.G, index=self.index
        )


def dense_layer(in_features, out_features):
    return torch.nn.Linear(in_features, out_features, device=DEVICE, dtype=torch.bfloat16)


def step_of(layer, N, in_features, out_features):
    """One forward and backward pass that leaves gradients behind, as a function."""
    x = torch.randn(N, in_features, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(N, out_features, device=DEVICE, dtype=torch.bfloat16)
    inputs = [x, *layer.parameters()]

    def step():
        return torch.autograd.grad(layer(x), inputs, dy)

    return step


def wall_us(*steps, rounds=25, calls=20) -> list[float]:
    """Wall time of a call while calls are queued: what the host needs, if that is the longer.

    The steps take turns; of each the fastest fifth of the rounds counts, for other work on the
    host disturbs the rest.
    """
    times = [[] for _ in steps]
    for step in steps:
        for _ in range(20):
            step()
    for _ in range(rounds):
        for step, taken in zip(steps, times, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                step()
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - start) / calls * 1e6)
    return [sorted(taken)[rounds // 5] for taken in times]


def launches():
    """Rows of eager and captured steps."""
    for N, i, o in [(1, 640, 2560), (32, 640, 2560), (512, 640, 2560), (8192, 640, 2560)]:
        dense = step_of(dense_layer(i, o), N, i, o)
        dense_graph = median_ms(dense, 2, 10)[0] * 1e3
        for B, G in [(128, 1), (64, 2), (32, 4), (16, 8), (16, 1)]:
            facts = {"N": N, "in": i, "out": o, "B": B, "row_group": G, "density": 0.5}
            ours = step_of(Layer(i, o, B, G, 0.5), N, i, o)
            facts |= {"kind": "launch", "unit": "us"}
            wall, dense_wall = wall_us(ours, dense)
            yield facts | {"what": "eager", "ours": wall, "dense": dense_wall}
            graph = median_ms(ours, 2, 10)[0] * 1e3
            yield facts | {"what": "CUDA graph", "ours": graph, "dense": dense_graph}


def peak_bytes(make, N, in_features, out_features) -> int:
    """Peak of the second training step with AdamW, everything that belongs to the layer."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    layer = make()
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    x = torch.randn(N, in_features, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory():
    """Rows of peaks, and of the weight alone."""
    peak_bytes(lambda: dense_layer(64, 64), 64, 64, 64)  # what libraries allocate at first use
    for N, i, o in [(2048, 640, 2560), (8192, 640, 2560), (512, 4096, 14336), (8192, 4096, 14336)]:
        dense = peak_bytes(lambda i=i, o=o: dense_layer(i, o), N, i, o) / 2**20
        for B, G in [(128, 1), (16, 8), (16, 1)]:
            for density in (0.25, 0.5, 0.6, 0.75, 0.85):
                facts = {"N": N, "in": i, "out": o, "B": B, "row_group": G}

                def make(i=i, o=o, B=B, G=G, density=density):
                    return Layer(i, o, B, G, density)

                layer = make()
                kept = [layer.values, layer.values, layer.cols, *layer.index]
                weight = sum(t.numel() * t.element_size() for t in kept) / 2**20
                facts |= {"density": layer.values.shape[1] / layer.C, "unit": "MiB"}
                facts["kind"] = "memory"
                del layer, kept
                ours = peak_bytes(make, N, i, o) / 2**20
                yield facts | {"what": "peak of a step", "ours": ours, "dense": dense}
                whole = 2 * i * o * 2 / 2**20
                yield facts | {"what": "values, gradient, indices", "ours": weight, "dense": whole}


def index():
    """Rows of the transposed index of TitanMAC layers, which a dense layer does not have."""
    for i, o in [(640, 2560), (2560, 640), (4096, 14336)]:
        for B, G in [(16, 8), (16, 1), (32, 4), (128, 1)]:
            layer = Layer(i, o, B, G, 0.5)

            def rebuild(layer=layer):
                return transposed_index(layer.cols, layer.C, out=layer.index)

            torch.cuda.set_sync_debug_mode("error")  # waiting for the device would raise
            rebuild()
            torch.cuda.set_sync_debug_mode("default")
            facts = {"kind": "index", "in": i, "out": o, "B": B, "row_group": G, "density": 0.5}
            facts["unit"] = "us"
            yield facts | {"what": "on the device", "ours": median_ms(rebuild, 2, 10)[0] * 1e3}
            yield facts | {"what": "wall, eager", "ours": wall_us(rebuild)[0]}
            if layer.cols.numel() * layer.C > MAX_LOOKED_THROUGH:
                continue

            def launched(layer=layer):
                return _blocks.transposed(layer.cols, layer.C)

            yield facts | {"what": "in one launch", "ours": median_ms(launched, 2, 10)[0] * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("layer.csv"))
    parser.add_argument("--kinds", nargs="+", default=["index", "memory", "launch"])
    parser.add_argument("--commit", default="unknown", help="for the header of the file")
    arguments = parser.parse_args()
    with arguments.out.open("w", newline="") as out:
        out.write(header(arguments.commit) + "\n")
        writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
        writer.writeheader()
        for kind in arguments.kinds:
            for row in {"index": index, "memory": memory, "launch": launches}[kind]():
                line = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(line)
                out.flush()
                print(line, flush=True)


if __name__ == "__main__":
    main()
