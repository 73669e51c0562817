"""Window attention: the kernels against masked calls of torch's and plain causal attention.

    python benchmarks/attention.py --out out

Forward and backward in bfloat16, 10 heads of width 64, 16 persistent tokens, replayed from a CUDA
graph. Every way is compared with the masked call before it is timed; plain causal attention
computes something else and is there as a yardstick. FlexAttention compiles for each shape and runs
on request only. One JSON line per cell goes to OUT/attention.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from step_parts import forward_and_both
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from titanmac_integration._attention._window import (
    WindowPlan,
    _by_torch,
    attention_mask,
    near_mask,
    window_attention,
)

HEADS, WIDTH, PERSISTENT = 10, 64, 16
CELLS = [(8, 1024, 512), (8, 2048, 512), (8, 4096, 512), (8, 4096, 128), (2, 16384, 512)]


def block_plan(tokens: int, window: int) -> WindowPlan:
    """Blocks whatever the length; the model uses them where they pay."""
    P = PERSISTENT
    first = attention_mask(window, window_size=window, n_persistent=P, device="cuda")
    near = near_mask(window, window, window_size=window, device="cuda")
    return WindowPlan(P, window, window, first, functional.pad(near, (P, 0), value=True))


def ways(tokens: int, window: int, flex: bool) -> dict[str, Callable]:
    mask = attention_mask(tokens, window_size=window, n_persistent=PERSISTENT, device="cuda")
    plan = block_plan(tokens, window)

    sdpa = functional.scaled_dot_product_attention
    found: dict[str, Callable] = {
        "one masked call": lambda q, k, v: sdpa(q, k, v, attn_mask=mask),
        "blocks": lambda q, k, v: _by_torch(q, k, v, plan, 0.0),
        "kernels": lambda q, k, v: window_attention(q, k, v, plan, 0.0),
        "plain causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    }
    if flex:

        def visible(batch, head, row, column):
            near = (row >= column) & (row - column < window) & (row >= PERSISTENT)
            return near | (column < PERSISTENT)

        length = PERSISTENT + tokens
        sparse = create_block_mask(visible, None, None, length, length, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        found["flex, compiled"] = lambda q, k, v: compiled(q, k, v, block_mask=sparse)
    return found


def measure(way: Callable, tensors: list[torch.Tensor], grad: torch.Tensor) -> dict:
    def both() -> None:
        torch.autograd.grad(way(*tensors), tensors, grad)

    def forward() -> None:
        with torch.no_grad():
            way(*tensors)

    return forward_and_both(forward, both, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flex", action="store_true", help="FlexAttention, too")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for batch, tokens, window in CELLS:
        shape = (batch, HEADS, PERSISTENT + tokens, WIDTH)
        tensors = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        ]
        grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        expected = None
        for name, way in ways(tokens, window, options.flex).items():
            row = {"batch": batch, "tokens": tokens, "window": window, "way": name}
            try:
                with torch.no_grad():
                    got = way(*tensors).float()
                expected = got if expected is None else expected
                row["error"] = (got - expected).abs().max().item()
                if name != "plain causal" and row["error"] > 0.05:
                    raise ValueError(f"differs by {row['error']}")
                row.update(measure(way, tensors, grad))
            except Exception as error:  # one bad cell shall not cost the others
                row["failed"] = repr(error)[:200]
            row.update(device=torch.cuda.get_device_name(), torch=torch.__version__)
            print(json.dumps(row), flush=True)
            with (options.out / "attention.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
