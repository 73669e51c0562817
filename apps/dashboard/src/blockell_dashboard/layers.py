"""Names of layers as people read and sort them."""

from __future__ import annotations

import re

__all__ = ["layer_label", "layer_order"]


def layer_label(name: str) -> str:
    """`blocks.3.mlp.fc1` as "Block 3 · fc1", a bare `2` as "Layer 2"; other names stay."""
    parts = name.split(".")
    if len(parts) == 1 and name.isdecimal():
        return f"Layer {name}"
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbers or numbers[0] == len(parts) - 1:
        return name
    rest = parts[numbers[0] + 1 :]
    if len(rest) > 1 and rest[0] in ("mlp", "ffn", "feed_forward"):
        rest = rest[1:]
    return f"Block {int(parts[numbers[0]])} · {'.'.join(rest)}"


def layer_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key of names with numbers in them: block 2 comes before block 10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]
