"""Which sizes fit which tiles."""

from __future__ import annotations

TILE_SIZES = (8, 16, 32, 64, 128)


def resolve_row_group(row_group: int | str, R: int, tile_size: int) -> int:
    """The number of block rows that share their columns.

    "auto" is the largest divisor of R with row_group * tile_size <= 128.
    """
    if row_group == "auto":
        limit = max(1, 128 // tile_size)
        return max(g for g in range(1, min(limit, R) + 1) if R % g == 0)
    if isinstance(row_group, str) or row_group < 1 or R % row_group:
        raise ValueError(
            f"row_group (={row_group!r}) must be 'auto' or a divisor of the number of block rows "
            f"(={R}); possible: {[g for g in range(1, R + 1) if R % g == 0]}."
        )
    return row_group


def check_divisible(name: str, value: int, tile_size: int) -> None:
    if value >= tile_size and value % tile_size == 0:
        return
    below = value // tile_size * tile_size
    nearest = f"{below} or {below + tile_size}" if below > 0 else f"{tile_size}"
    raise ValueError(
        f"{name} (={value}) must be a multiple of tile_size (={tile_size}); nearest: {nearest}."
    )
