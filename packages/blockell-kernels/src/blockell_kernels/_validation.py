"""Checks of what users pass in. Messages name argument, value, rule and remedy.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockell_kernels._stats import SAMPLES, probe_size
from blockell_kernels._transforms import transforms_active

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def packed(name: str, t: Tensor) -> Tensor:
    """The operand without gaps, as kernels read all but x: a copy where it has other strides."""
    if t.is_contiguous():
        return t
    if t.layout != torch.strided:
        _raise_for_layout(name, t)
    return t.contiguous()


def parts_of(name: str, index: Any) -> tuple[Tensor | None, Tensor | None]:
    """(order, col_start) of a transposed index, without gaps; None where there is none."""
    if index is None:
        return None, None
    try:
        order, start = index.order, index.col_start
    except AttributeError:
        raise ValueError(
            f"{name} is a {type(index).__name__}; it must have `order` and `col_start`: "
            "pass transposed_index(col_indices, C)."
        ) from None
    return packed(name, order), packed(name, start)


def _raise_for_layout(name: str, t: Tensor) -> None:
    raise ValueError(f"{name} has layout {t.layout}; it must be torch.strided: call .to_dense().")


def check_operands(
    x: Tensor,
    values: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    row_group: int,
    num_live: int,
    probe: Tensor | None,
    sample: str,
    index: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit. Reads no tensor's elements."""
    if x.layout != torch.strided:
        _raise_for_layout("x", x)
    if values.ndim != 4 or values.shape[2] != values.shape[3] or not values.shape[0]:
        raise ValueError(
            f"values has shape {tuple(values.shape)}; it must be [R, K, B, B] with square tiles, "
            "R at least 1."
        )
    if not values.shape[2]:
        raise ValueError(f"values has shape {tuple(values.shape)}; tiles must be at least 1 wide.")
    R, slots, B, _ = values.shape
    if col_indices.shape != (R, slots):
        raise ValueError(
            f"col_indices has shape {tuple(col_indices.shape)}; it must be {(R, slots)}, "
            "one column for each tile of values."
        )
    if col_indices.dtype != torch.int32:
        raise ValueError(
            f"col_indices has dtype {col_indices.dtype}; it must be torch.int32: "
            "pass col_indices.int()."
        )
    if not 1 <= num_live <= slots:
        raise ValueError(f"num_live (={num_live}) must be in [1, {slots}], the slots of a row.")
    if row_group < 1 or R % row_group:
        raise ValueError(f"row_group (={row_group}) must be a positive divisor of R (={R}).")
    if x.ndim < 1 or x.shape[-1] % B or x.shape[-1] < num_live * B:
        _raise_for_x(x, B, num_live)
    if bias is not None and bias.shape != (R * B,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; it must be {(R * B,)}, one entry per output."
        )
    if x.dtype != values.dtype or x.dtype not in DTYPES:
        _check_dtype("values", x, values)
    if bias is not None and bias.dtype != x.dtype:
        _check_dtype("bias", x, bias)
    device = x.device
    for name, t in (("values", values), ("col_indices", col_indices), ("bias", bias)):
        if t is not None and t.device != device:
            raise ValueError(
                f"{name} is on {t.device} and x on {device}; they must be on one device: "
                "move the input or the layer with .to()."
            )
    if sample != "none":
        _check_probe(probe, sample, R, x.shape[-1] // B, device)
    order, col_start = index
    if order is not None and col_start is not None and not transforms_active():
        # composed products need no index, and a model without tensors of its own has none to give
        _check_index(order, col_start, R * slots, x.shape[-1] // B, device)


def _check_index(
    order: Tensor, col_start: Tensor, entries: int, C: int, device: torch.device
) -> None:
    remedy = f"pass transposed_index(col_indices, {C}), made anew when the topology changes."
    for name, t, length in (("order", order, entries), ("col_start", col_start, C + 1)):
        if t.shape != (length,) or t.dtype != torch.int32:
            raise ValueError(
                f"index.{name} has shape {tuple(t.shape)} and dtype {t.dtype}; it must be int32 "
                f"[{length}]: {remedy}"
            )
        if t.device != device:
            raise ValueError(f"index.{name} is on {t.device} and x on {device}: {remedy}")


def _raise_for_x(x: Tensor, B: int, num_live: int) -> None:
    size = x.shape[-1] if x.ndim else None
    if size is None:
        raise ValueError("x is a scalar; it must be [..., in_features].")
    if size % B:
        below = size // B * B
        nearest = f"{below} or {below + B}" if below else f"{B}"
        raise ValueError(
            f"the last dimension of x (={size}) must be a multiple of the tile size (={B}); "
            f"nearest: {nearest}."
        )
    raise ValueError(
        f"the last dimension of x (={size}) has {size // B} block columns of {B}, fewer than the "
        f"{num_live} distinct ones that each row holds; pass an input at least {num_live * B} wide."
    )


def _check_dtype(name: str, x: Tensor, other: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(
            f"x has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64: "
            "pass x.float(), say."
        )
    if torch.is_autocast_enabled(x.device.type):
        return  # the operator casts them
    raise ValueError(
        f"{name} has dtype {other.dtype} and x {x.dtype}; they must be the same: cast one of them, "
        "or use torch.autocast."
    )


def _check_probe(probe: Tensor | None, sample: str, R: int, C: int, device: torch.device) -> None:
    if sample not in SAMPLES:
        raise ValueError(f"sample (={sample!r}) must be one of {', '.join(SAMPLES)}.")
    if probe is None:
        raise ValueError(
            f"sample (={sample!r}) needs a probe: a float32 tensor of {probe_size(R, C)} elements."
        )
    if probe.shape != (probe_size(R, C),) or probe.dtype != torch.float32:
        raise ValueError(
            f"probe has shape {tuple(probe.shape)} and dtype {probe.dtype}; it must be float32 "
            f"[probe_size(R, C)] = [{probe_size(R, C)}] for R={R}, C={C}."
        )
    if probe.device != device:
        raise ValueError(f"probe is on {probe.device} and x on {device}; move it with .to().")


def check_gradient_and_input(dy_name: str, dy: Tensor, x: Tensor, B: int) -> None:
    """Raise ValueError unless statistics of blocks can be taken of the two, in tiles of side B."""
    same = dy.shape[:-1] == x.shape[:-1] and dy.dtype == x.dtype and dy.device == x.device
    if not same or not dy.ndim or not x.ndim:
        raise ValueError(
            f"{dy_name} (shape {tuple(dy.shape)}, {dy.dtype}, {dy.device}) and x (shape "
            f"{tuple(x.shape)}, {x.dtype}, {x.device}) must be [..., features] and agree in all "
            "dimensions but the last, in dtype and in device; pass the gradient of the layer's "
            "output and its input."
        )
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{dy_name} and x have dtype {x.dtype}; it must be float16, bfloat16, float32 or "
            "float64."
        )
    for name, t in ((dy_name, dy), ("x", x)):
        if B < 1 or t.shape[-1] % B:
            raise ValueError(
                f"the last dimension of {name} (={t.shape[-1]}) must be a multiple of B (={B})."
            )


def check_topology(
    col_indices: Tensor, C: int, row_group: int = 1, num_live: int | None = None
) -> None:
    """Check a topology: to be called when it changes, not at every product.

    Every row's live entries are distinct and in [0, C), the spare ones (-1) follow, all rows have
    equally many, and the rows of a row group are equal. Reads the elements (on a GPU: waits).

    Args:
        col_indices: int32 [R, slots].
        C: block columns.
        row_group: rows that share their columns.
        num_live: live blocks per row that the caller counts on, or None.

    Raises:
        ValueError: naming the first row and slot that break a rule.
    """
    from blockell_format import validate_col_indices

    if col_indices.dtype != torch.int32:
        raise ValueError(
            f"col_indices has dtype {col_indices.dtype}; it must be torch.int32: "
            "pass col_indices.int()."
        )
    live = validate_col_indices(col_indices.detach().cpu().numpy(), C, row_group)
    if num_live is not None and live != num_live:
        raise ValueError(
            f"num_live (={num_live}) differs from the {live} live blocks per row in col_indices."
        )
