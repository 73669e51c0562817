"""Runs one small configuration of every GPU kernel, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python sanitize_gpu.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python sanitize_gpu.py

Without torch's cache every tensor is an allocation of its own, so an access past its end is seen.
Results are compared with dense products, so that a kernel that silently did nothing fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch

from blockell_format import create_random_topology, transposed_index
from blockell_kernels._activation import activate, activation_gradient
from blockell_kernels._backends import Pattern, get_backend
from blockell_kernels._gluon import _mlp as _by_turns
from blockell_kernels._gluon import _whole, _whole_values
from blockell_kernels._triton import (
    _activate,
    _blocks,
    _forward,
    _grad_input,
    _grad_values,
    _mlp,
    _walk,
)
from blockell_kernels._triton._sums import column_sums
from blockell_kernels._triton._tiling import Tiling

Kernel = Callable[[], torch.Tensor]


class Problem:
    """Small operands: `N` is no multiple of a tile, one slot is spare, a column may be empty."""

    def __init__(self, B: int, G: int, R: int, C: int, K: int, N: int, dtype: torch.dtype):
        cols = create_random_topology(R, C, K, torch.Generator().manual_seed(0), G)
        cols = torch.nn.functional.pad(cols, (0, 1), value=-1).cuda()
        self.pattern = Pattern(cols, C, B, G, K, *transposed_index(cols, C))
        g = torch.Generator("cuda").manual_seed(0)
        options = {"device": "cuda", "generator": g}
        self.x, self.dy = (torch.randn(N, n * B, **options).to(dtype) for n in (C, R))
        self.values = torch.randn(R, K + 1, B, B, **options).to(dtype)
        self.values[:, K:] = 0
        self.bias = torch.randn(R * B, **options).to(dtype)
        dense = get_backend("dense")
        self.y = dense.forward(self.x, self.values, self.bias, self.pattern)
        self.dx = dense.grad_input(self.dy, self.values, self.pattern)
        self.dv = dense.grad_values(self.dy, self.x, self.pattern)


def products(p: Problem, tiling: Tiling) -> Iterator[tuple[str, Kernel, torch.Tensor]]:
    run = (p.values, p.pattern, tiling)
    yield "forward", lambda: _forward.forward(p.x, p.values, p.bias, *run[1:]), p.y
    yield "grad_input", lambda: _grad_input.grad_input(p.dy, *run), p.dx
    yield "grad_values", lambda: _grad_values.grad_values(p.dy, p.x, *run[1:]), p.dv


def shipped(p: Problem) -> Iterator[tuple[str, Kernel, torch.Tensor]]:
    """Whatever the backend takes for these sizes."""
    b = get_backend("triton")
    yield "forward", lambda: b.forward(p.x, p.values, p.bias, p.pattern), p.y
    yield "grad_input", lambda: b.grad_input(p.dy, p.values, p.pattern), p.dx
    yield "grad_values", lambda: b.grad_values(p.dy, p.x, p.pattern), p.dv


def walks(p: Problem, walk: _walk.Walk) -> Iterator[tuple[str, Kernel, torch.Tensor]]:
    run = (p.values, p.pattern, walk)
    yield "forward", lambda: _walk.forward(p.x, p.values, p.bias, *run[1:]), p.y
    yield "grad_input", lambda: _walk.grad_input(p.dy, *run), p.dx
    yield "grad_values", lambda: _walk.grad_values(p.dy, p.x, *run[1:]), p.dv


def fused(p: Problem, tiling: Tiling) -> Iterator[tuple[str, Kernel, torch.Tensor]]:
    a, h = activate(p.y, "gelu"), p.x
    forward = (p.x, p.values, p.bias, p.pattern, tiling, "gelu", True)
    yield "forward, gelu", lambda: _forward.forward_activated(*forward)[0], a
    dh = activation_gradient(p.dx, h, "gelu")

    def middle(part: int) -> torch.Tensor:
        results = _mlp.grad_input_activated(
            p.dy, p.values, p.pattern, h, "gelu", keep_a=True, need_bias=True, tiling=tiling
        )
        assert results is not None
        return results[part]

    yield "middle", lambda: middle(0), dh
    yield "middle, bias", lambda: middle(2).sum(0), dh.float().sum(0)


def by_turns(p: Problem) -> Iterator[tuple[str, Kernel, torch.Tensor]]:
    """The products an activation rides on, in Gluon."""
    a, h = activate(p.y, "gelu"), p.x
    forward = (p.x, p.values, p.bias, p.pattern, "gelu", True)
    yield "forward", lambda: _by_turns.forward(*forward)[0], a
    dense = _blocks.to_dense(p.values, p.pattern)
    dh = activation_gradient(p.dx, h, "gelu")
    ways = {"by a dense weight": (dense, None)}
    if p.pattern.B == 128:
        ways["by blocks"] = (p.values, p.pattern)
    for name, (weight, pattern) in ways.items():

        def middle(part: int, weight=weight, pattern=pattern) -> torch.Tensor:
            return _by_turns.middle(p.dy, weight, pattern, h, "gelu", keep_a=True, need_bias=True)[
                part
            ]

        yield f"middle {name}", lambda middle=middle: middle(0), dh
        yield f"middle {name}, a", lambda middle=middle: middle(1), activate(h, "gelu")
        yield f"middle {name}, bias", lambda middle=middle: middle(2).sum(0), dh.float().sum(0)


def whole(p: Problem, cut: _whole.Cut) -> Iterator[tuple[str, Kernel, torch.Tensor]]:
    """Products by the whole weight, put together block by block."""
    yield "forward", lambda: _whole.product(p.x, p.values, p.bias, p.pattern, True, cut), p.y
    yield "grad_input", lambda: _whole.product(p.dy, p.values, None, p.pattern, False, cut), p.dx
    if cut.parts == 1:
        yield "grad_values", lambda: _whole_values.grad_values(p.dy, p.x, p.pattern), p.dv


def blocks(p: Problem) -> Iterator[tuple[str, Kernel, torch.Tensor]]:
    dense = _blocks.to_dense(p.values, p.pattern)
    rows = torch.arange(p.pattern.R, device="cuda")[:, None]
    B, R, C = p.pattern.B, p.pattern.R, p.pattern.C
    expected = torch.zeros(R, C, B, B, dtype=p.x.dtype, device="cuda")
    expected[rows, p.pattern.live.long()] = p.values[:, : p.pattern.num_live]
    expected = expected.transpose(1, 2).reshape(R * B, C * B)
    yield "to_dense", lambda: _blocks.to_dense(p.values, p.pattern), expected
    yield "from_dense", lambda: _blocks.from_dense(dense, p.pattern), p.values
    norms = (p.dy.float().T @ p.x.float()).view(R, B, C, B).square().sum((1, 3))
    yield "block_norms", lambda: _blocks.block_norms_sq(p.dy, p.x, B), norms
    sums = p.x.float().square().sum(0).view(C, B).sum(1)
    yield "column_sums", lambda: column_sums(p.x, torch.float32), p.x.float().sum(0)
    yield "block_sums", lambda: _blocks.block_sums_sq(p.x, B), sums
    yield "activate", lambda: _activate.activate(p.x, "silu"), activate(p.x.cpu(), "silu").cuda()
    slope = activation_gradient(p.x.cpu(), p.x.cpu(), "gelu").cuda()
    yield "slope", lambda: _activate.gradient(p.x, p.x, "gelu", recompute=True)[0], slope


def cases() -> Iterator[tuple[str, Kernel, torch.Tensor]]:
    bf16 = torch.bfloat16
    small, large = (64, 2, 4, 3, 2, 75, bf16), (128, 1, 2, 3, 2, 140, bf16)
    narrow = (16, 4, 8, 5, 2, 75, bf16)
    for sizes, path, BN, BK, options in [
        (narrow, "pointers", 64, 32, {}),
        (narrow, "packed", 64, 64, {"store_parts": 2}),
        (small, "descriptors", 64, 64, {}),
        (large, "descriptors", 128, 64, {"persistent": 1, "store_parts": 2}),
    ]:
        tiling = Tiling(path=path, BM=64, BN=BN, BK=BK, **options)
        p = Problem(*sizes)
        for name, kernel, expected in products(p, tiling):
            yield f"{path} {options} tile {sizes[0]}: {name}", kernel, expected
        if path == "descriptors":
            for name, kernel, expected in fused(p, tiling):
                yield f"{path} {options} tile {sizes[0]}: {name}", kernel, expected
    for B, G, R, C, K in ((16, 1, 8, 5, 2), (16, 8, 8, 5, 2), (32, 4, 4, 3, 2), (128, 1, 2, 3, 2)):
        for N in (1, 33, 700):
            p = Problem(B, G, R, C, K, N, bf16)
            for name, kernel, expected in shipped(p):
                yield f"shipped, tile {B}x{G}, {N} tokens: {name}", kernel, expected
    for B, G in ((128, 1), (64, 2), (64, 1), (32, 4), (16, 8)):
        for N in (300, 1100):
            p = Problem(B, G, 640 // B, 512 // B, 256 // B, N, bf16)
            for name, kernel, expected in shipped(p):
                yield f"middle, tile {B}x{G}, {N} tokens: {name}", kernel, expected
    for boxes in (False, True):
        walk = _walk.Walk(BM=64, BN=64, BK=32, parts=2, boxes=boxes, stages=3)
        for name, kernel, expected in walks(Problem(*narrow), walk):
            yield f"walk, boxes {boxes}: {name}", kernel, expected
    for sizes in (
        (16, 1, 26, 33, 9, 140, bf16),
        (32, 1, 13, 17, 5, 140, bf16),
        (64, 1, 7, 9, 4, 140, bf16),
        (128, 1, 3, 5, 2, 140, bf16),
    ):
        for cut in (_whole.Cut(2, 1), _whole.Cut(5, 1), _whole.Cut(4, 2)):
            for name, kernel, expected in whole(Problem(*sizes), cut):
                yield f"whole, {cut.pieces}x{cut.parts}, tile {sizes[0]}: {name}", kernel, expected
    for sizes in (
        (16, 8, 16, 8, 3, 300, bf16),
        (128, 1, 2, 3, 2, 140, bf16),
        (128, 1, 5, 4, 2, 4000, bf16),
    ):
        for name, kernel, expected in by_turns(Problem(*sizes)):
            yield f"turns, tile {sizes[0]}, {sizes[5]} tokens: {name}", kernel, expected
    for sizes in (narrow, large):
        for name, kernel, expected in blocks(Problem(*sizes)):
            yield f"tile {sizes[0]}: {name}", kernel, expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    count = 0
    for name, kernel, expected in cases():
        if arguments.only not in name:
            continue
        got = kernel()
        torch.cuda.synchronize()
        scale = expected.float().norm().clamp_min(1e-30)
        error = float((got.float() - expected.float()).norm() / scale)
        print(f"{error:.1e}  {name}", flush=True)
        if not error < 2e-2:
            raise SystemExit(f"{name}: off by {error}")
        count += 1
    print(f"{count} kernels' results are right", flush=True)


if __name__ == "__main__":
    main()
