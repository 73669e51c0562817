"""What callbacks share: who drives the topology, and its state in the trainers' checkpoints."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from blockell_format.snapshots import write_atomically
from titanmac_integration._training._tree import decode_tree, encode_tree

STATE_FILE = "topology_manager.json"
TENSORS_FILE = "topology_manager.safetensors"


def check_undriven(optimizer: object) -> None:
    """Raise ``ValueError`` if an optimizer drives the topology itself: blocks would move twice."""
    if getattr(optimizer, "topology", None) is not None:
        raise ValueError(
            f"optimizer (={type(optimizer).__name__}) drives the topology already, and its state "
            "is in its own; leave the callback out, or make the optimizer with topology=False."
        )


def write_manager_state(directory: Path, state: dict[str, Any]) -> None:
    """Write a ``state_dict`` as JSON and, where it has any, tensors."""
    plain, tensors = encode_tree(state)
    if tensors:
        write_atomically(directory / TENSORS_FILE, save(tensors))
    write_atomically(directory / STATE_FILE, (json.dumps(plain, indent=2) + "\n").encode())


def read_manager_state(directory: Path) -> dict[str, Any] | None:
    """What :func:`write_manager_state` wrote; None where nothing is.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return None
    tensors = directory / TENSORS_FILE
    try:
        plain = json.loads(path.read_bytes())
        state: dict[str, Any] = decode_tree(plain, load_file(tensors) if tensors.exists() else {})
    except Exception as error:  # safetensors raises its own type
        raise ValueError(f"{path} cannot be read: {error}.") from error
    return state
