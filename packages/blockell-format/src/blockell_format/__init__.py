"""The Block-ELL block-sparse format and the topology snapshot file format.

The numpy side (statistics, validation, checksums, `blockell_format.snapshots`) needs no torch.
The torch side (`BlockELLFormat`, conversions, `transposed_index`) is imported on first use and
asks for the extra by name when torch is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._statistics import (
    Overlap,
    block_mask,
    block_overlap,
    column_entropy,
    column_usage,
    exploration_rate,
    topology_checksum,
)
from ._validation import num_blocks_for_density, validate_col_indices

if TYPE_CHECKING:
    from . import snapshots
    from ._bsr import from_bsr, from_scipy, to_bsr, to_scipy
    from ._dense import from_block_list, from_dense, to_block_list, to_dense
    from ._ell import BlockELLFormat
    from ._index import TransposedIndex, transposed_index
    from ._topology import create_random_topology, expand_row_group

__version__ = "0.1.0"

__all__ = [
    "BlockELLFormat",
    "Overlap",
    "TransposedIndex",
    "block_mask",
    "block_overlap",
    "column_entropy",
    "column_usage",
    "create_random_topology",
    "expand_row_group",
    "exploration_rate",
    "from_block_list",
    "from_bsr",
    "from_dense",
    "from_scipy",
    "num_blocks_for_density",
    "snapshots",
    "to_block_list",
    "to_bsr",
    "to_dense",
    "to_scipy",
    "topology_checksum",
    "transposed_index",
    "validate_col_indices",
]

_TORCH_NAMES = {
    "BlockELLFormat": "_ell",
    "TransposedIndex": "_index",
    "transposed_index": "_index",
    "create_random_topology": "_topology",
    "expand_row_group": "_topology",
    "to_dense": "_dense",
    "from_dense": "_dense",
    "to_block_list": "_dense",
    "from_block_list": "_dense",
    "to_bsr": "_bsr",
    "from_bsr": "_bsr",
    "to_scipy": "_bsr",
    "from_scipy": "_bsr",
}


def __getattr__(name: str) -> Any:
    if name == "snapshots":
        return importlib.import_module(".snapshots", __name__)
    if name not in _TORCH_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_TORCH_NAMES[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"blockell_format.{name} needs torch, which is not installed; "
            'install it with: pip install "blockell-format[torch]"'
        ) from error
    value = getattr(module, name)
    globals()[name] = value  # the next access does not come through here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
