"""A model on disk: ``model.safetensors`` and ``model.json``, each complete or absent."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from blockell_format.snapshots import write_atomically
from titanmac_integration._config._config import TitanMACConfig

from ._titanmac import TitanMAC, create_titanmac_model

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "model.json"


def save_checkpoint(
    model: TitanMAC, directory: str | os.PathLike[str], *, info: Mapping[str, Any] | None = None
) -> Path:
    """Write weights, topology and configuration of ``model``; returns the weights' path.

    ``info`` is anything JSON can hold about the training. An existing checkpoint is replaced.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    content = {"format": "titanmac", "version": 1, "config": model.config.to_dict()}
    write_atomically(directory / WEIGHTS_FILE, save(tensors))
    write_json(directory / CONFIG_FILE, {**content, "info": dict(info or {})})
    return directory / WEIGHTS_FILE


def load_checkpoint(
    directory: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> TitanMAC:
    """The model that :func:`save_checkpoint` wrote into ``directory``.

    Raises:
        FileNotFoundError: there is no such directory, or it holds no checkpoint.
        ValueError: its content is no TitanMAC checkpoint or does not fit together.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "be a directory" if directory.exists() else "exist"
        raise FileNotFoundError(f"directory (={str(directory)!r}) must {what}; give that of a run.")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"directory (={str(directory)!r}) must hold a checkpoint, but has no {name}; it is "
                "written when training ends."
            )
    try:
        content = json.loads((directory / CONFIG_FILE).read_bytes())
        if not isinstance(content, dict) or content.get("format") != "titanmac":
            raise ValueError("it is not a TitanMAC configuration")
        if content.get("version") != 1:
            raise ValueError(f"version {content.get('version')!r} is not known")
        config = TitanMACConfig.from_dict(content["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG_FILE} cannot be read: {error}.") from error
    model = create_titanmac_model(config)
    try:
        model.load_state_dict(load((directory / WEIGHTS_FILE).read_bytes()))
    except Exception as error:  # safetensors raises its own type for a damaged file
        raise ValueError(f"{directory / WEIGHTS_FILE} cannot be read: {error}.") from error
    return model.to(device)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON for people and programs, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
