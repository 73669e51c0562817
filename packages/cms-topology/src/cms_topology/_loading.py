"""What a layer checks of a state that is loaded into it, before and after."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

import blockell_format as fmt

if TYPE_CHECKING:
    from cms_topology._linear import CMSBlockLinear


def check_own_columns(columns: npt.NDArray[np.int32], C: int, row_group: int) -> None:
    """`validate_col_indices` of what a layer found in its buffer.

    Raises:
        ValueError: a rule is broken; also what to do if nobody has set them yet.
    """
    try:
        fmt.validate_col_indices(columns, C, row_group)
    except ValueError as error:
        raise ValueError(
            f"{error} If nobody has set them yet, as after to_empty() or skip_init(): load a "
            "state, or call reset_parameters()."
        ) from None


def before_load(layer: CMSBlockLinear, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """A hook that refuses what does not fit before anything of the layer is changed.

    Raises:
        ValueError: the state is of a layer with other sizes, tiles, slots or row groups.
    """
    values, columns = state.get(f"{prefix}values"), state.get(f"{prefix}col_indices")
    if isinstance(values, Tensor):
        _check_shape(layer, f"{prefix}values", tuple(values.shape))
    if isinstance(columns, Tensor) and columns.shape == layer.col_indices.shape:
        _check_columns(layer, f"{prefix}col_indices", columns)
    if values is None and f"{prefix}weight" in state:
        warnings.warn(
            f"{prefix}weight is of a dense layer and is not loaded; load it into the dense model "
            "and then sparsify that.",
            stacklevel=2,
        )
    if (values is None) != (columns is None):
        given, missing = "values", "col_indices"
        if values is None:
            given, missing = missing, given
        warnings.warn(
            f"{prefix}{given} is loaded without {prefix}{missing}, and the layer keeps its own: "
            "tiles mean nothing without their columns. Save the whole state_dict, with buffers.",
            stacklevel=2,
        )


def after_load(module: nn.Module, _incompatible: object) -> None:
    """A hook that takes over the topology that was loaded."""
    module._check_topology()  # type: ignore[operator]
    layer: Any = module
    ages = layer.scorer.block_age
    if layer._clock is None and not ages.is_meta and bool((ages > 0).any()):
        layer.collect_candidates = True  # as it was where these ages were counted


def _check_shape(layer: CMSBlockLinear, name: str, found: tuple[int, ...]) -> None:
    own = (layer.R, layer.K, layer.B, layer.B)
    if found == own:
        return
    advice = "it is not of a layer of this size."
    if len(found) == 4 and found[2] == found[3] and found[0] * found[2] == layer.out_features:
        columns, tile = layer.in_features // found[2], found[2]
        advice = (
            f"build the layer with tile_size={tile} and max_density={found[1] / columns:g}, or "
            "make it anew by sparsify() of what densify() makes of the checkpoint's model."
        )
    raise ValueError(
        f"{name} of the checkpoint (shape {list(found)}) must be [R, K, tile, tile] = {list(own)}: "
        f"{advice}"
    )


def _check_columns(layer: CMSBlockLinear, name: str, columns: Tensor) -> None:
    if columns.is_meta or type(columns) not in (Tensor, nn.Parameter):
        return  # nothing to look at
    host = columns.cpu().numpy()
    try:
        fmt.validate_col_indices(host, layer.C, layer.row_group)
    except ValueError as error:
        said = f"{name} of the checkpoint: {error}"
        if layer.row_group > 1 and _is_topology(host, layer.C):
            said += (
                " Build the layer with the row_group that the checkpoint's had; row_group=1 takes "
                "any."
            )
        raise ValueError(said) from error


def _is_topology(col_indices: npt.NDArray[np.int32], C: int) -> bool:
    try:
        fmt.validate_col_indices(col_indices, C)
    except ValueError:
        return False
    return True
