"""Checks of what users pass in. Messages name argument, value, rule and remedy.

Legend: R block rows, C block columns, K live blocks per row, B tile side, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockell_kernels._stats import SAMPLES, probe_size


def check_operands(
    x: Tensor,
    values: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    row_group: int,
    num_live: int,
    probe: Tensor | None,
    sample: str,
) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit. Reads no tensor's elements."""
    if values.ndim != 4 or values.shape[2] != values.shape[3]:
        raise ValueError(
            f"values has shape {tuple(values.shape)}; it must be [R, K, B, B] with square tiles."
        )
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
    if x.dtype != values.dtype or not x.dtype.is_floating_point:
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
    if not x.dtype.is_floating_point:
        raise ValueError(f"x has dtype {x.dtype}; it must be a floating-point type.")
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
