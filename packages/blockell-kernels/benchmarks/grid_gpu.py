"""The grid of GPU figures: ours against dense cuBLAS and torch's BSR, every cell, wins and losses.

    python grid_gpu.py --out results/h200.csv

A gate comes first: every product is compared with the dense one before it is timed. Times are
those of CUDA graph replays with a cold L2, random data, medians with the 20th and 80th percentile,
ours and dense in turns. `auto_us` is what the dispatcher takes: a sparse kernel ("whole" by the
whole weight, put together block by block, "sparse" the others), or the dense product with the
weight scattered at every call ("fallback"). "layer" is the three products of a
training step as the operator runs them: where forward and input gradient are both dense, they share
one copy of the weight. `--shard I/N` measures every N-th problem, for several GPUs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import triton
from triton.testing import do_bench
from tune_gpu import SHAPES, Problem, relative_error

from blockell_kernels._backends import DIRECTIONS, Case, get_backend, select
from blockell_kernels._plan import plan_for
from blockell_kernels._triton import _ways

FEW = [(n, i, o) for n in (1, 32, 64, 128, 256, 512) for _, i, o in (*SHAPES[:2], SHAPES[4])]
MEDIUM = [(1024, 640, 2560), (2048, 640, 2560), (2048, 2560, 640), (2048, 4096, 14336)]
MEDIUM += [(4096, 1024, 1024), (16384, 1536, 6144)]
SIZES = [(768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2048, 2048)]
SIZES += [(2048, 8192), (8192, 2048), (1536, 6144), (4096, 4096), (14336, 4096), (5120, 5120)]
BETWEEN = [(n, i, o) for n in (32, 128, 384, 768, 1536, 3072, 6144) for i, o in SIZES]
"""For the dispatcher alone: layers between those with goals."""
WHOLE_TOKENS = 4096
"""Beyond, products by the whole weight are not timed: they take a third longer than dense ones."""
DENSE_TIMES: dict[tuple[object, ...], list[float]] = {}
MOST_TURNS = 25
CLEAR = None  # more bytes than the L2 cache holds; made where there is a GPU
STRUCTURES = [(128, 1), (64, 2), (64, 1), (32, 4), (32, 1), (16, 8), (16, 1), (8, 16), (8, 1)]
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5, "tf32": 1e-3}
FACTS = ["direction", "N", "in", "out", "B", "row_group", "density", "K", "dtype", "chosen"]
TIMES = ["auto_us", "auto_p20_us", "auto_p80_us", "sparse_us", "whole_us", "fallback_us", "bsr_us"]
DENSE = ["dense_us", "dense_p20_us", "dense_p80_us"]
FIELDS = [*FACTS, *TIMES, *DENSE, "speedup", "sparse_tflops", "error"]


def captured(function) -> torch.cuda.CUDAGraph:
    """A function's launches as a graph."""
    function()  # compiles, outside of the capture
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        function()
        graph.capture_end()
    torch.cuda.synchronize()
    return graph


def in_turns(functions: dict[str, object], budget_ms: float) -> dict[str, list[float]]:
    """[median, 20th, 80th percentile] of each one's graph replays, the L2 cache cold.

    They take turns, 3 to `MOST_TURNS` times, so that all meet the same clocks: large products heat
    the GPU up. What takes over four times as long as the fastest stays out after three turns.
    """
    graphs = {name: captured(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(MOST_TURNS + 1):
        fastest = min(min(taken, default=0.0) for taken in times.values())
        events = {}
        for name, graph in graphs.items():
            if turn > 3 and min(times[name]) > 4 * fastest:
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            CLEAR.zero_()
            start.record()
            graph.replay()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            if turn > 0:
                times[name].append(start.elapsed_time(end) * 1e3)
        if turn > 2 and sum(map(sum, times.values())) > 1e3 * budget_ms * len(graphs):
            break
    for graph in graphs.values():
        graph.reset()
    shares = (0.5, 0.2, 0.8)
    return {
        name: [sorted(taken)[int(share * (len(taken) - 1))] for share in shares]
        for name, taken in times.items()
    }


def products(problem: Problem, backend_of: dict[str, str]):
    """The three products by the named backends, as functions."""
    p = problem
    b = {direction: get_backend(name) for direction, name in backend_of.items()}
    return {
        "forward": lambda: b["forward"].forward(p.x, p.values, None, p.pattern),
        "grad_input": lambda: b["grad_input"].grad_input(p.dy, p.values, p.pattern),
        "grad_values": lambda: b["grad_values"].grad_values(p.dy, p.x, p.pattern),
    }


def all_of(functions):
    return lambda: [function() for function in functions.values()]


def plan_of(problem: Problem):
    p, x = problem.pattern, problem.x
    return plan_for(x, x.shape[0], (p.R, p.C, p.B, p.row_group, p.num_live), "auto")


def layer(problem: Problem):
    """The three products of a training step as the operator runs them."""
    p, t, plan = problem.pattern, problem, plan_of(problem)

    def step():
        y, weight = plan.forward(t.x, t.values, None, p, keep=True)
        return y, plan.backward(t.dy, t.x, t.values, p, (True, True, False), "none", [weight])

    return step


def choices(problem: Problem) -> dict[str, str]:
    p, x = problem.pattern, problem.x
    sizes = (x.shape[0], p.R, p.C, p.num_live, p.B, p.row_group)
    return {d: select(Case(d, x.device, x.dtype, *sizes)).backend for d in DIRECTIONS}


def layer_choices(problem: Problem) -> str:
    """What the products of a training step run by: a copy of the weight serves two of them."""
    names = choices(problem)
    if plan_of(problem).keeps:
        names |= {"forward": "dense", "grad_input": "dense"}
    return "/".join(names.values())


def case_of(problem: Problem, direction: str) -> Case:
    p, x = problem.pattern, problem.x
    sizes = (x.shape[0], p.R, p.C, p.num_live, p.B, p.row_group)
    return Case(direction, x.device, x.dtype, *sizes)


def sparse_products(problem: Problem, direction: str) -> dict[str, object]:
    """One product by the sparse kernels: "whole", where that can run, and "sparse", the others.

    Past what records launches, which takes one way for all calls of a kind.
    """
    p, t, case = problem.pattern, problem, case_of(problem, direction)
    a, b = {"forward": (t.x, t.values), "grad_input": (t.dy, t.values)}.get(direction, (t.dy, t.x))
    bias = (None,) if direction == "forward" else ()
    found = {}
    for way in _ways.WAYS[1:]:
        how = way.how(case)
        if how is not None and way.takes(a, b, p.B):
            found["sparse"] = partial(getattr(way, direction), a, b, *bias, p, how)
            break
    if case.N <= WHOLE_TOKENS and _ways.WHOLE.takes(a, b, p.B):
        found["whole"] = partial(getattr(_ways.WHOLE, direction), a, b, *bias, p, True)
    return found


def product_times(problem: Problem, direction: str, by_sparse: bool, rep_ms: int):
    """Times of one product: "dense" alone, "fallback", the weight scattered first, and sparse ways.

    float32's dense products are slow: they are timed once per shape of a run, and where the sparse
    kernel beats the dense product alone, the fallback is left out.
    """
    ways = {"dense": problem.dense_product(direction)}
    ways["fallback"] = products(problem, dict.fromkeys(DIRECTIONS, "dense"))[direction]
    ways |= sparse_products(problem, direction)
    if problem.x.dtype != torch.float32:
        return in_turns(ways, rep_ms)
    shape = (direction, *problem.x.shape, problem.dy.shape[1])
    if shape not in DENSE_TIMES:
        DENSE_TIMES[shape] = in_turns({"dense": ways["dense"]}, 2 * rep_ms)["dense"]
    found = in_turns({"sparse": ways["sparse"]}, rep_ms) | {"dense": DENSE_TIMES[shape]}
    if by_sparse and found["sparse"][0] < found["dense"][0]:
        return found | {"fallback": [None]}
    return found | in_turns({"fallback": ways["fallback"]}, rep_ms)


def measure(problem: Problem, rep_ms: int, bsr: bool, parts: str):
    """Rows of one problem: of its products, of the layer, or of both; `parts` says which."""
    chosen = choices(problem)
    p, x = problem.pattern, problem.x
    flops = 2 * x.shape[0] * p.R * p.num_live * p.B**2
    sparse_us = 0.0
    for direction in DIRECTIONS if parts != "layers" else ():
        by_backend = products(problem, dict.fromkeys(DIRECTIONS, "triton"))[direction]
        runs = [by_backend, *sparse_products(problem, direction).values()]
        error = max(relative_error(run(), problem.reference(direction)) for run in runs)
        tf32 = torch.backends.cuda.matmul.allow_tf32
        limit = TOLERANCE["tf32" if tf32 else problem.facts["dtype"]]
        assert error < limit, f"gate: {problem.facts} {direction}: error {error}"
        by_sparse = chosen[direction] == "triton"
        times = product_times(problem, direction, by_sparse, rep_ms)
        way = "whole" if _ways.way_of(case_of(problem, direction)) is _ways.WHOLE else "sparse"
        way = way if way in times else "sparse"
        times["auto"] = times[way if by_sparse else "fallback"]
        sparse_us += times[way][0]
        ask_bsr = bsr and direction == "forward" and 0.2 <= p.num_live / p.C <= 0.5
        bsr_us = bsr_forward(problem, rep_ms) if ask_bsr and x.shape[0] >= 8192 else None
        more = {"bsr_us": bsr_us, "error": error}
        more["sparse_tflops"] = flops / times["sparse"][0] / 1e6
        yield row(problem, direction, chosen[direction], times) | more
    if parts != "products":
        dense = all_of({d: problem.dense_product(d) for d in DIRECTIONS})
        times = in_turns({"auto": layer(problem), "dense": dense}, 2 * rep_ms)
        times |= {"sparse": [sparse_us or None], "fallback": [None]}
        yield row(problem, "layer", layer_choices(problem), times)


def row(problem, direction, chosen, times) -> dict[str, object]:
    facts = problem.facts | {"row_group": problem.facts["G"], "K": problem.pattern.num_live}
    if torch.backends.cuda.matmul.allow_tf32:
        facts["dtype"] = "tf32"
    facts["density"] = problem.pattern.num_live / problem.pattern.C
    auto, dense = times["auto"], times["dense"]
    facts |= {"direction": direction, "chosen": chosen, "sparse_us": times["sparse"][0]}
    facts |= {"whole_us": times.get("whole", [None])[0]}
    facts |= {"auto_us": auto[0], "auto_p20_us": auto[1], "auto_p80_us": auto[2]}
    facts |= {"dense_us": dense[0], "dense_p20_us": dense[1], "dense_p80_us": dense[2]}
    return facts | {"fallback_us": times["fallback"][0], "speedup": dense[0] / auto[0]}


def bsr_forward(problem: Problem, rep_ms: int) -> float | None:
    """torch's own block-sparse product; None where it refuses."""
    B = problem.pattern.B
    try:
        weight = problem.dense.to_sparse_bsr((B, B))
        ms = do_bench(
            lambda: torch.nn.functional.linear(problem.x, weight),
            warmup=5,
            rep=rep_ms,
            return_mode="median",
        )
    except (RuntimeError, ValueError) as error:
        print("torch BSR:", problem.facts, str(error)[:80])
        return None
    return ms * 1e3


def header(commit: str) -> str:
    device = torch.cuda.get_device_name()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"# {device}, {versions}, commit {commit}, {today}"


def problems(part: str, dtype: torch.dtype, tokens: range, structures: list[tuple[int, int]]):
    """Functions that make the problems of the grid: 25% and 50% of all shapes, then the rest."""
    first, rest = [], []
    for make, density in all_problems(dtype, tokens, structures):
        (first if density in (0.25, 0.5) else rest).append(make)
    between = [make for make, _ in all_problems(dtype, tokens, structures, True)]
    return {"all": first + rest, "first": first, "rest": rest, "between": between}[part]


def all_problems(
    dtype: torch.dtype, tokens: range, structures: list[tuple[int, int]], between: bool = False
):
    """Pairs of such a function and its density."""
    some = [0.1, 0.25, 0.5, 0.75, 1.0]
    grid = [(SHAPES, [0.05, *some]), (MEDIUM, some), (FEW, some)]
    for shapes, densities in [(BETWEEN, some)] if between else grid:
        for shape in shapes:
            for B, G in structures:
                if shape[2] // B % G or shape[0] not in tokens:
                    continue
                seen = set()
                for density in sorted(densities, key=lambda d: d not in (0.25, 0.5)):
                    K = max(1, round(density * (shape[1] // B)))
                    if K not in seen:
                        seen.add(K)
                        yield (
                            lambda s=shape, b=(B, G), d=density: Problem(*s, *b, d, dtype),
                            density,
                        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("grid.csv"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rep-ms", type=int, default=6)
    parser.add_argument("--compile-s", type=float, default=600, help="compile no longer ahead")
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--part", default="all", choices=["all", "first", "rest", "between"],
                        help="first: densities 0.25 and 0.5; rest: the others; between: other "
                        "layers, for the dispatcher's table")  # fmt: skip
    parser.add_argument("--structures", nargs="+", metavar="TILExROWGROUP",
                        default=[f"{B}x{G}" for B, G in STRUCTURES])  # fmt: skip
    parser.add_argument("--commit", default="unknown", help="for the header of the file")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 for float32 products")
    parser.add_argument("--bsr", action="store_true", help="time torch's BSR product (untuned)")
    parser.add_argument("--measure", default="both", choices=["both", "products", "layers"])
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th problem, from the I-th")
    parser.add_argument("--max-tokens", type=int, default=2**20, help="leave larger ones out")
    parser.add_argument("--min-tokens", type=int, default=1, help="leave smaller ones out")
    parser.add_argument("--compile-only", help="I/N: run every I-th problem once, to compile")
    arguments = parser.parse_args()
    global CLEAR
    dtype, started = getattr(torch, arguments.dtype), time.time()
    CLEAR = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    span = range(arguments.min_tokens, arguments.max_tokens + 1)
    shard, shards = map(int, arguments.shard.split("/"))
    structures = [tuple(map(int, name.split("x"))) for name in arguments.structures]
    makers = problems(arguments.part, dtype, span, structures)[shard::shards]
    if arguments.compile_only:
        worker, workers = map(int, arguments.compile_only.split("/"))
        for make in makers[worker::workers]:
            for name in ("triton", "dense"):
                try:
                    all_of(products(make(), dict.fromkeys(DIRECTIONS, name)))()
                except Exception as error:  # the measuring process will meet it, and say so
                    print(f"compiling: {error!r}"[:200], flush=True)
            torch.cuda.empty_cache()  # many workers share the GPU
        return
    command = [sys.executable, *sys.argv, "--compile-only"]
    workers = [subprocess.Popen([*command, f"{i}/{arguments.jobs}"]) for i in range(arguments.jobs)]
    for worker in workers:
        try:
            assert worker.wait(max(1, started + arguments.compile_s - time.time())) == 0
        except subprocess.TimeoutExpired:
            worker.terminate()  # what is left compiles when it is measured
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    with arguments.out.open("w", newline="") as out:
        out.write(header(arguments.commit) + "\n")
        writer = csv.DictWriter(out, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for make in makers:
            problem = make()
            try:
                lines = list(measure(problem, arguments.rep_ms, arguments.bsr, arguments.measure))
            except Exception as error:  # one cell's failure is reported, the others measured
                print(f"FAILED {problem.facts}: {error!r}"[:400], flush=True)
                continue
            for line in lines:
                rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()}
                writer.writerow(rounded)
            out.flush()
            torch.cuda.empty_cache()
            if time.time() - started > 60 * arguments.minutes:
                print("stopped: out of time", flush=True)
                break
    print(f"all in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
