"""Times every sensible tiling of every product on the GPU at hand; writes one JSON line each.

    python tune_gpu.py --out tilings.jsonl                 # compile in parallel, then time
    python tune_gpu.py --compile-only --shard 3/14         # one of the compiling processes

The package's tiling rules (`_triton/_tilings.py`) are written from this output. Every candidate is
checked against the dense product before it is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from triton.testing import do_bench

from blockell_format import create_random_topology, num_blocks_for_density, transposed_index
from blockell_kernels._backends import Pattern
from blockell_kernels._triton import _blocks, _forward, _grad_input, _grad_values
from blockell_kernels._triton._tiling import Tiling, power_of_two_divisor

SHAPES = [
    (8192, 640, 2560),
    (8192, 2560, 640),
    (65536, 640, 2560),
    (65536, 2560, 640),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
]
STRUCTURES = [(128, 1), (64, 2), (64, 1), (32, 4), (16, 8)]
SMEM_LIMIT_BYTES = 227 * 1024


def wide_tilings(B: int, size: int) -> Iterator[Tiling]:
    """Products whose programs own 64 or 128 outputs: candidates found good in a full search."""
    step = 128 // size
    box = min(step, B)
    deep = step // box  # narrow boxes: as many bytes in flight, in more stages
    for path, BM, warps, stages, persistent, parts in [
        ("descriptors", 128, 4, 3, 2, 2),
        ("descriptors", 128, 4, 4, 2, 2),
        ("descriptors", 128, 4, 5, 1, 1),
        ("descriptors", 128, 4, 4, 0, 1),
        ("descriptors", 128, 8, 4, 1, 1),
        ("descriptors", 256, 8, 4, 1, 2),
        ("descriptors", 256, 8, 4, 0, 2),
        ("descriptors", 256, 8, 3, 0, 1),
        ("descriptors", 256, 4, 4, 0, 1),
        ("descriptors", 256, 4, 4, 1, 1),
        ("descriptors", 64, 4, 4, 2, 1),
        ("descriptors", 64, 4, 4, 3, 2),
        ("pointers", 128, 4, 3, 0, 1),
        ("pointers", 128, 8, 3, 0, 1),
    ]:
        shape = {"BM": BM, "BN": 128, "warps": warps, "persistent": persistent}
        if path == "pointers":
            yield Tiling(**shape, BK=step, stages=stages)
        else:
            shape |= {"path": path, "store_parts": parts}
            yield Tiling(**shape, BK=box, stages=stages * deep)


def packed_tilings(size: int) -> Iterator[Tiling]:
    for BM, warps, stages, parts in [
        (128, 4, 3, 1),
        (128, 4, 3, 2),
        (128, 8, 3, 1),
        (256, 8, 3, 1),
        (256, 8, 4, 2),
    ]:
        shape = {"BM": BM, "BN": 128, "BK": 128 // size, "warps": warps, "stages": stages}
        yield Tiling(path="packed", store_parts=parts, **shape)
        if parts == 1:
            yield Tiling(**shape)


def narrow_tilings(size: int) -> Iterator[Tiling]:
    """Input gradients of tiles below 64: few outputs per program."""
    for path, BM, warps, stages in [
        ("pointers", 256, 4, 3),
        ("pointers", 256, 8, 3),
        ("pointers", 128, 4, 3),
        ("descriptors", 256, 4, 3),
        ("descriptors", 256, 4, 4),
        ("descriptors", 128, 4, 4),
    ]:
        yield Tiling(path=path, BM=BM, BN=32, BK=128 // size, warps=warps, stages=stages)


def grad_values_tilings(B: int, size: int) -> Iterator[Tiling]:
    step = 128 // size
    for path, BN, BK, warps, stages, waves in [
        ("descriptors", 256, step, 8, 4, 1),
        ("descriptors", 256, step, 8, 3, 1),
        ("descriptors", 128, step, 4, 3, 2),
        ("descriptors", 128, step, 4, 3, 1),
        ("descriptors", 128, step, 8, 4, 1),
        ("descriptors", 64, 2 * step, 4, 4, 1),
        ("pointers", 256, step, 8, 4, 1),
        ("pointers", 256, step, 8, 3, 2),
        ("pointers", 128, step, 4, 3, 2),
        ("pointers", 128, step, 4, 4, 1),
    ]:
        if path == "pointers" or (BN in (B, 2 * B) and B >= 64):
            shape = {"BM": 128, "BN": BN, "BK": BK, "warps": warps, "stages": stages}
            yield Tiling(path=path, waves=waves, **shape)


def gluon_tilings(direction: str, B: int, width: int) -> Iterator[Tiling]:
    """The Gluon kernels' tilings: 16-bit operands, on Hopper."""
    if direction == "forward" and B >= 16 and width == 128:
        for BM in (256, 320):
            yield Tiling(path="gluon", BM=BM, BN=128, BK=64)
    if direction == "grad_input" and 16 <= B <= 64 and width >= 64:
        for BN, BK in ((256, 128), (320, 64), (128, 128), (256, 64)):
            if width >= BK:
                yield Tiling(path="gluon", BM=128, BN=BN, BK=BK)
    if direction == "grad_values" and B >= 16 and width >= 64:
        yield Tiling(path="gluon", BM=width, BN=256, BK=64)


def median_ms(product, warmup_ms: float, rep_ms: float, quantiles=(0.5,)) -> list[float]:
    """Quantiles of the product's time as a CUDA graph: what the GPU takes, not Python's launch."""
    product()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        product()
        graph.capture_end()
    times = do_bench(graph.replay, warmup=warmup_ms, rep=rep_ms, quantiles=list(quantiles))
    graph.reset()
    return times if isinstance(times, list) else [times]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


class Problem:
    """One shape and structure, with the three products and their dense references."""

    def __init__(self, N, in_features, out_features, B, G, density, dtype):
        self.facts = {"N": N, "in": in_features, "out": out_features}
        self.facts |= {"B": B, "G": G, "density": density}
        self.facts["dtype"] = str(dtype).removeprefix("torch.")
        generator = torch.Generator("cuda").manual_seed(0)
        R, C = out_features // B, in_features // B
        K = num_blocks_for_density(C, density)
        cols = create_random_topology(R, C, K, generator=generator, row_group=G, device="cuda")
        index = transposed_index(cols, C)
        self.pattern = Pattern(cols, C, B, G, K, index.order, index.col_start)
        options = {"device": "cuda", "generator": generator}
        self.x = torch.randn(N, in_features, **options).to(dtype)
        self.dy = torch.randn(N, out_features, **options).to(dtype)
        self.values = (torch.randn(R, K, B, B, **options) / (K * B) ** 0.5).to(dtype)
        self.dense = _blocks.to_dense(self.values, self.pattern)

    def product(self, direction: str, tiling: Tiling):
        if direction == "forward":
            return lambda: _forward.forward(self.x, self.values, None, self.pattern, tiling)
        if direction == "grad_input":
            return lambda: _grad_input.grad_input(self.dy, self.values, self.pattern, tiling)
        return lambda: _grad_values.grad_values(self.dy, self.x, self.pattern, tiling)

    def dense_product(self, direction: str):
        if direction == "forward":
            return lambda: torch.nn.functional.linear(self.x, self.dense)
        if direction == "grad_input":
            return lambda: self.dy @ self.dense
        return lambda: self.dy.T @ self.x

    def reference(self, direction: str) -> torch.Tensor:
        result = self.dense_product(direction)()
        return _blocks.from_dense(result, self.pattern) if direction == "grad_values" else result

    def tilings(self, direction: str) -> list[Tiling]:
        B, G, size = self.pattern.B, self.pattern.row_group, self.x.element_size()
        if direction == "grad_values":
            found = list(grad_values_tilings(B, size))
        elif direction == "grad_input" and B < 64:
            found = list(narrow_tilings(size))
        else:
            found = list(wide_tilings(B, size)) if B >= 32 else []
            found += packed_tilings(size) if B <= 32 and direction == "forward" else []
        if direction == "grad_input" and B >= 64:
            found += [replace(t, group_m=1024) for t in found]
        found = [t for t in found if self.fits(direction, t, B * G)]
        if size == 2 and torch.cuda.get_device_capability()[0] == 9:
            found += gluon_tilings(direction, B, min(128, power_of_two_divisor(B * G)))
        return found

    def fits(self, direction: str, t: Tiling, width: int) -> bool:
        if direction == "grad_input":
            width = self.pattern.B
        elif direction == "grad_values":
            width = t.BN
        width, size = min(width, t.BN), self.x.element_size()
        loads = (t.BM + width) * t.BK * size * t.stages
        if t.path != "pointers" and direction != "grad_values":
            loads += t.BM * width * size // t.store_parts
        return loads * max(1, t.persistent) <= SMEM_LIMIT_BYTES


def compile_all(structures, dtype, shard: int, shards: int) -> None:
    number = 0
    for B, G in structures:
        problem = Problem(512, 2560, 640, B, G, 0.5, dtype)
        for direction in ("forward", "grad_input", "grad_values"):
            for tiling in problem.tilings(direction):
                number += 1
                if number % shards != shard:
                    continue
                try:
                    problem.product(direction, tiling)()
                except Exception as error:  # too much shared memory, say: timed ones report it
                    print("compile", B, G, direction, tiling, str(error)[:100], flush=True)
    torch.cuda.synchronize()


def time_all(shapes, structures, densities, dtype, out, rep_ms: int) -> None:
    for shape in shapes:
        for B, G in structures:
            for density in densities:
                problem = Problem(*shape, B, G, density, dtype)
                for direction in ("forward", "grad_input", "grad_values"):
                    time_problem(problem, direction, out, rep_ms)


def time_problem(problem: Problem, direction: str, out, rep_ms: int) -> None:
    reference = problem.reference(direction)
    dense = median_ms(problem.dense_product(direction), 10, 3 * rep_ms)[0]
    best = None
    for tiling in problem.tilings(direction):
        product = problem.product(direction, tiling)
        try:
            error = relative_error(product(), reference)
            if not error < 1e-2:
                print("WRONG", problem.facts, direction, tiling, error, flush=True)
                continue
            ms = median_ms(product, 3, rep_ms)[0]
        except Exception as error:
            print("failed", problem.facts, direction, tiling, str(error)[:100], flush=True)
            continue
        line = problem.facts | {"direction": direction, "ms": ms, "dense_ms": dense}
        out.write(json.dumps(line | {"tiling": tiling.__dict__}) + "\n")
        if best is None or ms < best[0]:
            best = (ms, tiling)
    out.flush()
    facts = " ".join(str(value) for value in problem.facts.values())
    if best:
        t = best[1]
        print(
            f"{facts} {direction}: dense {dense * 1e3:.1f} us, best {best[0] * 1e3:.1f} us, "
            f"{dense / best[0]:.2f}x  {t.path} BM{t.BM} BN{t.BN} BK{t.BK} w{t.warps} s{t.stages} "
            f"P{t.persistent} parts{t.store_parts} waves{t.waves} g{t.group_m}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="tilings.jsonl")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5])
    parser.add_argument("--structures", nargs="+", default=[f"{B}x{G}" for B, G in STRUCTURES])
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)))
    parser.add_argument("--rep-ms", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--shard", default="0/1")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    structures = [tuple(map(int, s.split("x"))) for s in arguments.structures]
    if arguments.compile_only:
        compile_all(structures, dtype, *map(int, arguments.shard.split("/")))
        return
    started = time.time()
    command = [sys.executable, *sys.argv, "--compile-only", "--shard"]
    workers = [subprocess.Popen([*command, f"{i}/{arguments.jobs}"]) for i in range(arguments.jobs)]
    for worker in workers:
        worker.wait()
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    with open(arguments.out, "w") as out:
        shapes = [SHAPES[i] for i in arguments.shapes]
        time_all(shapes, structures, arguments.densities, dtype, out, arguments.rep_ms)
    print(f"all in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
