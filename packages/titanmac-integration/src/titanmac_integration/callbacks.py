"""Block-sparse layers in other people's training loops: Hugging Face's Trainer, Lightning.

Each class is imported when it is first asked for, since each needs a library of its own:

- `HuggingFaceTopologyCallback`: the extra ``hf``.
- `LightningTopologyCallback`: the extra ``lightning``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._callbacks._hf import HuggingFaceTopologyCallback
    from ._callbacks._lightning import LightningTopologyCallback

__all__ = ["HuggingFaceTopologyCallback", "LightningTopologyCallback"]

_PLACES = {
    "HuggingFaceTopologyCallback": ("_callbacks._hf", "transformers", "hf"),
    "LightningTopologyCallback": ("_callbacks._lightning", "lightning", "lightning"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, library, extra = _PLACES[name]
    try:
        return getattr(importlib.import_module(f".{module}", __package__), name)
    except ImportError as error:
        raise ImportError(
            f"{name} needs {library}, which is not installed; install it with: "
            f"pip install 'titanmac-integration[{extra}]'"
        ) from error
