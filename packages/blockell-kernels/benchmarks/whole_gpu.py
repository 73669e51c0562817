"""Times the products by the whole weight beside dense ones, however they may be cut.

    python whole_gpu.py --out results/h200-whole.csv --commit 1234567

Every product is compared with the dense one first. Times are medians of CUDA graph replays with a
cold L2, at 50% density with free rows. The cuts are those that `_whole.cut`
expects to take least, so that it can be judged; `table_gpu.py` reads the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import grid_gpu
import torch
from grid_gpu import DIRECTIONS, header, in_turns, products
from tune_gpu import Problem, relative_error

from blockell_kernels._gluon import _whole, _whole_values

SIZES = [(4096, 14336), (640, 2560), (2560, 640), (2048, 2048), (14336, 4096)]
SIZES += [(768, 3072), (5120, 5120), (3072, 768), (1024, 1024)]
TOKENS = [512, 128, 8192, 256, 2048, 64, 1024, 4096]
SHAPES = [(n, i, o) for n in TOKENS for i, o in SIZES if n * max(i, o) <= 2**27]
SHAPES += [(32, 4096, 14336), (32, 14336, 4096), (65536, 640, 2560), (32, 2048, 2048)]
SHAPES += [(16, 4096, 14336)]
TILES = (32, 16, 64)
LIMIT = 1e-2


def cuts(N: int, outputs: int, depth: int, B: int, count: int) -> list[_whole.Cut]:
    """The `count` cuts that are expected to take least, the chosen one first."""
    device = torch.cuda.get_device_properties(0)
    found = _whole.cuts(N, outputs, depth, B, device.multi_processor_count)
    return found[:count]


def ways_of(p: Problem, direction: str, count: int) -> dict[str, object]:
    """The products by the whole weight, by name."""
    if direction == "grad_values":
        return {"values": lambda: _whole_values.grad_values(p.dy, p.x, p.pattern)}
    forward = direction == "forward"
    a, outputs = (p.x, p.dy.shape[1]) if forward else (p.dy, p.x.shape[1])
    depth = a.shape[1]
    return {
        f"{c.pieces}x{c.parts}": lambda c=c: _whole.product(
            a, p.values, None, p.pattern, forward, c
        )
        for c in cuts(a.shape[0], outputs, depth, p.pattern.B, count)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("whole.csv"))
    parser.add_argument("--commit", default="unknown", help="for the header of the file")
    parser.add_argument("--cuts", type=int, default=3, help="how many to time")
    parser.add_argument("--rep-ms", type=float, default=2)
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th shape, from the I-th")
    arguments = parser.parse_args()
    shard, shards = map(int, arguments.shard.split("/"))
    grid_gpu.CLEAR = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    grid_gpu.MOST_TURNS = 13
    with arguments.out.open("w") as out:
        out.write(header(arguments.commit) + "\n")
        out.write("direction,N,in,out,B,density,way,us,error\n")
        for n, i, o in SHAPES[shard::shards]:
            for B in TILES:
                p = Problem(n, i, o, B, 1, 0.5, torch.bfloat16)
                for direction in DIRECTIONS:
                    ways = ways_of(p, direction, arguments.cuts)
                    expected = p.reference(direction)
                    error = max(relative_error(way(), expected) for way in ways.values())
                    assert error < LIMIT, f"gate: {p.facts} {direction}: error {error}"
                    copied = products(p, dict.fromkeys(DIRECTIONS, "dense"))[direction]
                    ways |= {"dense": p.dense_product(direction), "fallback": copied}
                    for way, times in in_turns(ways, arguments.rep_ms).items():
                        line = f"{direction},{n},{i},{o},{B},0.5,{way},{times[0]:.2f},{error:.3g}"
                        out.write(line + "\n")
            out.flush()


if __name__ == "__main__":
    main()
