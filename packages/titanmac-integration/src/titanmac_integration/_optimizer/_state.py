"""What DeepNestedOptimizer saves besides AdamW's state, and how it is checked and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._optimizer import DeepNestedOptimizer


def nested_state(optimizer: DeepNestedOptimizer) -> dict[str, Any]:
    """Clock, nested parts, topology clock and spike detector; None for parts that are off."""
    manager = optimizer.topology
    memory, controller, meta = optimizer.deep_momentum, optimizer.controller, optimizer._meta
    newborns = optimizer._newborns
    return {
        "cms": optimizer.cms.state_dict(),
        "deep_momentum": memory.state_dict() if memory is not None else None,
        "controller": controller.state_dict() if controller is not None else None,
        "meta": meta.state_dict() if meta is not None else None,
        "topology": manager.state_dict() if manager is not None else None,
        "newborns": newborns.state_dict() if newborns is not None else None,
        "spikes": optimizer.spikes.state_dict(),
    }


def load_nested_state(optimizer: DeepNestedOptimizer, state: Mapping[str, Any]) -> None:
    """Continue where `state` was taken; `check_fits` has passed."""
    optimizer.cms.load_state_dict(state["cms"])
    if optimizer.deep_momentum is not None:
        optimizer.deep_momentum.load_state_dict(state["deep_momentum"])
    if optimizer.controller is not None:
        optimizer.controller.load_state_dict(state["controller"])
    if optimizer._meta is not None:
        optimizer._meta.load_state_dict(state["meta"])
    if optimizer.topology is not None:
        optimizer.topology.load_state_dict(state["topology"])
    if optimizer._newborns is not None:
        optimizer._newborns.load_state_dict(state["newborns"])
    optimizer.spikes.load_state_dict(state["spikes"])


def check_fits(
    optimizer: DeepNestedOptimizer, state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a state of other nested parts or levels before anything is changed.

    Raises:
        ValueError: names what differs.
    """
    parts = {
        "deep_momentum": optimizer.deep_momentum,
        "controller": optimizer.controller,
        "topology": optimizer.topology,
    }
    for name, part in parts.items():
        mine, theirs = part is not None, state[name] is not None
        if mine != theirs:
            raise ValueError(
                f"{name} (={'on' if mine else 'off'}) differs from the checkpoint's "
                f"(={'on' if theirs else 'off'}); build the optimizer as it was."
            )
    levels = [group["level"] for group in optimizer.param_groups]
    saved = [group.get("level", 0) for group in groups]
    if levels != saved:
        raise ValueError(
            f"levels of the parameter groups (={levels}) differ from the checkpoint's (={saved}); "
            "build the optimizer with the same cms."
        )
