"""Random topologies and row groups.

Legend: R block rows, C block columns, K blocks per row, G rows of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._validation import validate_row_group


def expand_row_group(group_columns: Tensor, row_group: int) -> Tensor:
    """Give every row of a group the group's columns.

    Args:
        group_columns: [R / G, K].
        row_group: G, at least 1.

    Returns:
        [R, K], contiguous, a copy also for G = 1.
    """
    groups, K = group_columns.shape
    wide = group_columns[:, None].expand(groups, row_group, K)
    return wide.reshape(groups * row_group, K).clone(memory_format=torch.contiguous_format)


def create_random_topology(
    R: int,
    C: int,
    K: int,
    generator: torch.Generator | None = None,
    row_group: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw K distinct columns for every row (group), uniformly; ascending within the row.

    Args:
        R: block rows.
        C: block columns.
        K: blocks per row, in [1, C].
        generator: source of randomness; the draw happens on its device, so that the result does
            not depend on `device`. Default: the global one of `device`.
        row_group: rows that share their columns, a divisor of R.
        device: where the result lies; default: the generator's device, or the CPU. "meta" gives
            a tensor without content and draws nothing.

    Returns:
        int32 [R, K].

    Raises:
        ValueError: R or C below 1, K outside [1, C], row_group not a divisor of R.
    """
    if R < 1 or C < 1:
        raise ValueError(f"R (={R}) and C (={C}) must be at least 1.")
    if not 1 <= K <= C:
        raise ValueError(f"K (={K}) must be in [1, {C}]: a row cannot hold a column twice.")
    validate_row_group(R, row_group)
    if device is None:
        device = generator.device if generator is not None else torch.device("cpu")
    device = torch.device(device)
    if device.type == "meta":
        return torch.empty(R, K, dtype=torch.int32, device=device)
    draw_on = generator.device if generator is not None else device
    keys = torch.rand(R // row_group, C, generator=generator, dtype=torch.float32, device=draw_on)
    chosen = keys.argsort(dim=1, stable=True)[:, :K]
    columns = chosen.sort(dim=1).values.to(device=device, dtype=torch.int32)
    return expand_row_group(columns, row_group)
