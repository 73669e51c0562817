"""The fused MLP on the GPU: forward and backward against dense torch.compile, and its parts.

    python mlp_gpu.py --out results/h200-mlp.csv --commit $(git rev-parse --short HEAD)

Correctness first: output and gradients against the same MLP by dense products. Times are medians
of CUDA graph replays with a cold L2, random data, bfloat16, biases; dense and ours in the same run.
`--parts` also times the products with and without what rides on them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
from pathlib import Path

import torch
import triton
from torch.nn import functional
from tune_gpu import median_ms

from blockell_format import (
    create_random_topology,
    num_blocks_for_density,
    to_dense,
    transposed_index,
)
from blockell_kernels import block_ell_linear, block_ell_mlp
from blockell_kernels._activation import activate, gradient_and_activation, sum_over_tokens
from blockell_kernels._backends import Pattern, get_backend
from blockell_kernels._gluon import _mlp as _by_turns
from blockell_kernels._triton import _mlp
from blockell_kernels._triton._tiling import Tiling

SHAPES = [(8192, 640, 2560), (8192, 4096, 14336), (65536, 640, 2560), (8192, 2560, 640)]
DTYPE = torch.bfloat16
FIELDS = ["N", "width", "hidden", "B", "G", "density", "contender", "us", "p20_us", "p80_us"]
FIELDS += ["speedup", "peak_mib", "held_mib"]


class Problem:
    def __init__(self, N: int, width: int, hidden: int, B: int, G: int, density: float):
        generator = torch.Generator("cuda").manual_seed(0)
        options = {"device": "cuda", "generator": generator}
        self.facts = {"N": N, "width": width, "hidden": hidden}
        self.facts |= {"B": B, "G": G, "density": density}
        self.G, self.inputs, self.dense, self.cols, self.index = G, [], [], [], []
        self.x = torch.randn(N, width, **options).to(DTYPE).requires_grad_()
        self.dy = torch.randn(N, width, **options).to(DTYPE)
        self.patterns = []
        for R, C in ((hidden // B, width // B), (width // B, hidden // B)):
            K = num_blocks_for_density(C, density)
            cols = create_random_topology(R, C, K, generator=generator, row_group=G, device="cuda")
            values = (torch.randn(R, K, B, B, **options) / (K * B) ** 0.5).to(DTYPE)
            bias = torch.randn(R * B, **options).to(DTYPE).requires_grad_()
            self.dense += [to_dense(values, cols, R, C, K, B).requires_grad_(), bias]
            self.inputs += [values.requires_grad_(), bias]
            self.cols.append(cols)
            self.index.append(transposed_index(cols, C))
            self.patterns.append(Pattern(cols, C, B, G, K, *self.index[-1]))

    def fused(self, recompute=None, backend=None):
        values1, bias1, values2, bias2 = self.inputs
        return block_ell_mlp(
            self.x, values1, self.cols[0], bias1, values2, self.cols[1], bias2, "gelu",
            row_group1=self.G, row_group2=self.G, index1=self.index[0], index2=self.index[1],
            recompute=recompute, backend=backend,
        )  # fmt: skip

    def separate(self):
        values1, bias1, values2, bias2 = self.inputs
        options = [{"row_group": self.G, "index": index} for index in self.index]
        h = block_ell_linear(self.x, values1, self.cols[0], bias1, **options[0])
        return block_ell_linear(functional.gelu(h), values2, self.cols[1], bias2, **options[1])

    def gate(self) -> None:
        got = torch.autograd.grad(self.fused(), (self.x, *self.inputs), self.dy)
        want = torch.autograd.grad(dense_mlp(self.x, *self.dense), (self.x, *self.dense), self.dy)
        errors = [relative(got[0], want[0]), relative(got[2], want[2]), relative(got[4], want[4])]
        B = self.facts["B"]
        for position, pattern in ((1, self.patterns[0]), (3, self.patterns[1])):
            blocks = want[position].view(pattern.R, B, pattern.C, B).transpose(1, 2)
            rows = torch.arange(pattern.R, device="cuda")[:, None]
            errors.append(relative(got[position], blocks[rows, pattern.live.long()]))
        if not max(errors) < 2e-2:
            raise SystemExit(f"gate: {self.facts}: {errors}")


def dense_mlp(x, weight1, bias1, weight2, bias2):
    return functional.linear(functional.gelu(functional.linear(x, weight1, bias1)), weight2, bias2)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def contenders(p: Problem, compiled_dense, compiled_ours, quick: bool):
    """(name, forward, what it is differentiated by besides x)."""
    yield "dense compiled", lambda: compiled_dense(p.x, *p.dense), p.dense
    yield "ours", p.fused, p.inputs
    yield "ours, activation recomputed", lambda: p.fused("activation"), p.inputs
    yield "ours, hidden recomputed", lambda: p.fused("hidden"), p.inputs
    yield "ours, two layers", p.separate, p.inputs
    if not quick:
        yield "dense eager", lambda: dense_mlp(p.x, *p.dense), p.dense
        yield "ours compiled", lambda: compiled_ours(p), p.inputs


def memory(forward, step) -> tuple[float, float]:
    """MiB beyond the operands: a step's peak, and what is held between forward and backward."""
    torch.cuda.synchronize()
    time.sleep(0.05)  # until autograd's thread has let go of what it held
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    time.sleep(0.05)
    before = torch.cuda.memory_allocated()
    y = forward()
    held = torch.cuda.memory_allocated() - before - y.nbytes
    return peak / 2**20, held / 2**20


def measure(p: Problem, compiled_dense, compiled_ours, rep_ms: int, quick: bool):
    p.gate()
    reference = None
    for name, forward, inputs in contenders(p, compiled_dense, compiled_ours, quick):

        def step(forward=forward, inputs=inputs):
            return torch.autograd.grad(forward(), (p.x, *inputs), p.dy)

        try:
            step()
            peak, held = memory(forward, step)
            us, p20, p80 = (ms * 1e3 for ms in median_ms(step, 2, rep_ms, (0.5, 0.2, 0.8)))
        except Exception as error:
            print("failed:", p.facts, name, repr(error)[:300], flush=True)
            continue
        reference = reference or us
        yield p.facts | {
            "contender": name, "us": us, "p20_us": p20, "p80_us": p80, "speedup": reference / us,
            "peak_mib": peak, "held_mib": held,
        }  # fmt: skip


TRITON = Tiling(path="descriptors", BM=128, BN=128, BK=64, stages=3, store_parts=2, persistent=2)


def parts(p: Problem, rep_ms: int) -> None:
    """Prints what each product takes, alone and with what rides on it."""
    triton_backend = get_backend("triton")
    first, second = p.patterns
    with torch.no_grad():
        values1, bias1, values2, _ = p.inputs
        x = p.x.detach()

        def forward(activation, keep):
            return lambda: _mlp.forward_activated(x, values1, bias1, first, activation, keep)

        _, h = forward("gelu", True)()
        da = triton_backend.grad_input(p.dy, values2, second)
        functions = {
            "forward 1": lambda: triton_backend.forward(x, values1, bias1, first),
            "forward 1 gelu": forward("gelu", False),
            "forward 1 gelu, kept": forward("gelu", True),
            "forward 1 relu, kept": forward("relu", True),
            "gelu alone": lambda: activate(h, "gelu"),
            "gradient, gelu and bias alone": lambda: gradient_and_activation(
                da, h, "gelu", recompute=True, need_sum=True
            ),
            "gradient alone": lambda: gradient_and_activation(
                da, h, "gelu", recompute=False, need_sum=False
            ),
            "gradient and bias alone": lambda: gradient_and_activation(
                da, h, "gelu", recompute=False, need_sum=True
            ),
            "sum of dh alone": lambda: sum_over_tokens(h),
            "grad_input 2": lambda: triton_backend.grad_input(p.dy, values2, second),
            "forward 2": lambda: triton_backend.forward(h, values2, bias1[: p.x.shape[1]], second),
            "grad_values 2": lambda: triton_backend.grad_values(p.dy, h, second),
            "grad_values 1": lambda: triton_backend.grad_values(h, x, first),
            "grad_input 1": lambda: triton_backend.grad_input(h, values1, first),
        }
        dense = p.dense[2].detach()
        for keep in (True, False):
            wants = {"keep_a": keep, "need_bias": True}
            name = f"middle{', a' if keep else ''}"
            if second.B == 128:
                functions[f"{name}: by turns"] = lambda w=wants: _by_turns.middle(
                    p.dy, values2, second, h, "gelu", **w
                )
                functions[f"{name}: Triton"] = lambda w=wants: _mlp.grad_input_activated(
                    p.dy, values2, second, h, "gelu", **w, tiling=TRITON
                )
            functions[f"{name}: by turns, dense weight"] = lambda w=wants: _by_turns.middle(
                p.dy, dense, None, h, "gelu", **w
            )
        for name, function in functions.items():
            try:
                print(f"{median_ms(function, 2, rep_ms)[0] * 1e3:8.1f} us  {name}", flush=True)
            except Exception as error:
                print("failed:", name, repr(error)[:200], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("mlp.csv"))
    parser.add_argument("--rep-ms", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", help="instead of the usual ones", metavar="NxINxHID")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--parts", type=int, default=0, help="of the first so many shapes")
    parser.add_argument("--quick", action="store_true", help="leave out what compiles longest")
    parser.add_argument("--layouts", nargs="+", default=["128x1"], metavar="TILExROWGROUP")
    parser.add_argument("--commit", default="unknown", help="for the header of the file")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes or []] or SHAPES
    compiled_dense = torch.compile(dense_mlp, fullgraph=True, dynamic=False)
    compiled_ours = torch.compile(Problem.fused, dynamic=False)
    torch._dynamo.config.recompile_limit = 64
    started = time.time()
    with arguments.out.open("w", newline="") as out:
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        versions = f"torch {torch.__version__}, triton {triton.__version__}"
        device = torch.cuda.get_device_name()
        out.write(f"# {device}, {versions}, commit {arguments.commit}, {today}\n")
        writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
        writer.writeheader()
        for layout in arguments.layouts:
            B, G = map(int, layout.split("x"))
            for N, width, hidden in shapes:
                for density in arguments.densities:
                    p = Problem(N, width, hidden, B, G, density)
                    for row in measure(
                        p, compiled_dense, compiled_ours, arguments.rep_ms, arguments.quick
                    ):
                        print(
                            f"{time.time() - started:5.0f} s  {layout} {N} {width} -> {hidden} "
                            f"{density}: {row['contender']:27} {row['us']:9.1f} us "
                            f"{row['speedup']:.2f}x {row['peak_mib']:.0f} MiB, "
                            f"held {row['held_mib']:.0f}",
                            flush=True,
                        )
                        rounded = {k: f"{v:.4g}" if isinstance(v, float) else v
                                   for k, v in row.items()}  # fmt: skip
                        writer.writerow(rounded)
                        out.flush()
    for layout in arguments.layouts:
        B, G = map(int, layout.split("x"))
        for shape in shapes[: arguments.parts]:
            print(f"{time.time() - started:5.0f} s  parts of {layout} {shape} 0.5", flush=True)
            parts(Problem(*shape, B, G, 0.5), arguments.rep_ms)


if __name__ == "__main__":
    main()
