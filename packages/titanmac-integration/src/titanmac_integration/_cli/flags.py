"""Flags made from the fields of the configuration classes, with their docstrings as help."""

import argparse
import ast
import dataclasses
import inspect
import os
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from titanmac_integration._config._config import TitanMACConfig
from titanmac_integration._config._presets import PRESETS
from titanmac_integration._presets import RUN_PRESETS
from titanmac_integration._training._config import TrainingConfig
from titanmac_integration._training._processes import launched_by_torchrun


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Preset, run directory, device, and a flag per field of the configurations."""
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="model shape, training settings and tasks to start from (default: demo)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="RUN_DIR", help="directory of the run"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the run that RUN_DIR may hold"
    )
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", "cuda:1", ...')
    parser.add_argument("--dense", action="store_true", help="make every linear layer dense")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the results")
    add_fields(parser.add_argument_group("training"), TrainingConfig)
    add_fields(parser.add_argument_group("model"), TitanMACConfig)


def model_config(arguments: argparse.Namespace, preset: str) -> TitanMACConfig:
    """The preset with the flags that were given.

    Raises:
        ValueError: a flag of something that is switched off, and would do nothing.
    """
    changes = model_changes(arguments)
    config = TitanMACConfig.preset(preset, **changes)
    for name in given_fields(arguments, TitanMACConfig):
        switch = _switch(name)
        if switch is None or switch in changes or getattr(config, switch):
            continue  # what a user switches off may keep its settings
        raise ValueError(
            f"{_flag(name)} (={getattr(config, name)}) has no effect without {_flag(switch)}; add "
            f"that, or leave {_flag(name)} out."
        )
    return config


def _switch(name: str) -> str | None:
    """The field that must be on for field ``name`` to have an effect."""
    if name.startswith("memory_") or name in ("titans_variant", "segment_size"):
        return "use_neural_memory"
    return "use_block_sparse" if name.startswith("block_sparse_") else None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def model_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the model's configuration that flags were given for, ``--dense`` included.

    Raises:
        ValueError: two flags contradict each other.
    """
    changes = given_fields(arguments, TitanMACConfig)
    if arguments.dense:
        if changes.get("use_block_sparse"):
            raise ValueError("--dense and --use-block-sparse exclude each other; give one of them.")
        changes["use_block_sparse"] = False
    return changes


def training_config(arguments: argparse.Namespace, preset: str) -> TrainingConfig:
    """The preset's settings with the flags that were given."""
    settings = RUN_PRESETS[preset].training
    return TrainingConfig.from_dict({**settings, **given_fields(arguments, TrainingConfig)})


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; under torchrun, the process's own device.

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched_by_torchrun():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f'--device (={name}) cannot be used: {first}. Try "auto".') from error
    return device


def given_fields(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of a configuration class that flags were given for."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def add_fields(group: argparse._ArgumentGroup, cls: type) -> None:
    """A flag per field of a configuration class; only those given end up in the arguments."""
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        flag = _flag(field.name)
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        options["help"] = docs[field.name].replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            parse, metavar = _PARSERS.get(field.name, (type(field.default), None))
            group.add_argument(flag, type=parse, metavar=metavar, **options)


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for node, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[node.target.id] = " ".join(str(following.value.value).split())
    return docs


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _layers(text: str) -> tuple[int, ...] | None:
    return None if text == "all" else _ints(text)


def _components(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _density(text: str) -> float | dict[int, float]:
    if ":" not in text:
        return float(text)
    return _mapping((part.split(":") for part in text.split(",")), int, float)


def _levels(text: str) -> dict[str, int]:
    return _mapping((part.rsplit(":", 1) for part in text.split(",")), str, int)


def _mapping(
    pairs: Iterable[list[str]], key_of: Callable[[str], Any], value_of: Callable[[str], Any]
) -> dict[Any, Any]:
    """The pairs, none of which may come twice: the last one would win without a word."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key_of(key) in found:
            raise ValueError(f"{key} comes twice")
        found[key_of(key)] = value_of(value)
    return found


def _row_group(text: str) -> int | str:
    return text if text == "auto" else int(text)


# argparse names these functions in its messages
_ints.__name__ = "comma-separated integers"
_layers.__name__ = "layers (all, or 0,1,...)"
_density.__name__ = "density (0.5, or 0:0.5,1:0.25)"
_levels.__name__ = "levels (PATTERN:LEVEL,...)"
_row_group.__name__ = "row group (auto, or an integer)"

_PARSERS: dict[str, tuple[Callable[[str], Any], str | None]] = {
    "cms_levels": (_levels, "PATTERN:LEVEL,..."),
    "level_periods": (_ints, "1,10,100"),
    "block_sparse_layers": (_layers, "all|0,1,..."),
    "block_sparse_components": (_components, "mlp,attention"),
    "block_sparse_density": (_density, "0.5|0:0.5,1:0.25"),
    "block_sparse_row_group": (_row_group, "auto|N"),
    "block_sparse_max_density": (float, "0.75"),
    "memory_layers": (_layers, "all|0,1,..."),
}
