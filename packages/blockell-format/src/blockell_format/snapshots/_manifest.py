"""run.json: identity, layers and attempts of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._files import MAX_STEP, RUN_FILE, read_small, write_atomically
from ._json import dumps, from_plain, loads, to_plain
from ._layers import LayerInfo
from ._problems import RunError, describe, printable

FORMAT = "blockell-run"
VERSION = 1
MAX_RUN_FILE_BYTES = 64 << 20
MAX_WORLD_SIZE = 1 << 20
_LAYER_KEYS = tuple(entry.name for entry in dataclasses.fields(LayerInfo))


@dataclass(frozen=True)
class Attempt:
    """One start of the training job that writes to the run."""

    attempt: int
    """1 for the first start."""
    resume_step: int
    """The step it continued from: what earlier attempts recorded later is superseded."""
    created: float
    """Unix time."""
    world_size: int
    """Number of ranks."""
    config: dict[str, Any] | None = None
    """What the job was started with; None if it did not say."""


@dataclass(frozen=True)
class Manifest:
    """Content of run.json."""

    run_id: str
    created: float
    layers: tuple[LayerInfo, ...]
    attempts: tuple[Attempt, ...]
    limits: dict[int, int] = field(init=False, compare=False)
    """Last valid step of every attempt that was superseded."""

    def __post_init__(self) -> None:
        limits: dict[int, int] = {}
        limit: int | None = None
        for entry in reversed(self.attempts):
            if limit is not None:
                limits[entry.attempt] = limit
            limit = entry.resume_step if limit is None else min(limit, entry.resume_step)
        object.__setattr__(self, "limits", limits)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the latest attempt that gave one."""
        given = [entry.config for entry in self.attempts if entry.config is not None]
        return given[-1] if given else {}

    def is_superseded(self, step: int, attempt: int) -> bool:
        """Whether a later attempt went back behind this step."""
        limit = self.limits.get(attempt)
        return limit is not None and step > limit


def layer_table(layers: Iterable[LayerInfo]) -> str:
    """The layer table as compact JSON, `[[name, R, C, K, B, row_group], ...]`.

    Equal tables give equal text.
    """
    return dumps([dataclasses.astuple(layer) for layer in layers])


def parse_layer_table(table: Any) -> tuple[LayerInfo, ...]:
    """Layers from parsed JSON: a list of objects, or of lists in the order of `LayerInfo`.

    Raises:
        ValueError: not a list of valid layers with unique names.
    """
    if not isinstance(table, list):
        raise ValueError("the layer table is not a list")
    layers = []
    for number, entry in enumerate(table):
        if isinstance(entry, list):
            entry = dict(zip(_LAYER_KEYS, entry, strict=False))
        if not isinstance(entry, dict) or not entry.keys() >= set(_LAYER_KEYS):
            raise ValueError(f"entry {number} of the layer table lacks one of {_LAYER_KEYS}")
        layers.append(LayerInfo(*(entry[key] for key in _LAYER_KEYS)))
    if len({layer.name for layer in layers}) != len(layers):
        raise ValueError("the layer table names a layer twice")
    return tuple(layers)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write run.json atomically."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "run_id": manifest.run_id,
        "created": manifest.created,
        "layers": [dataclasses.asdict(layer) for layer in manifest.layers],
        "attempts": [dataclasses.asdict(entry) for entry in manifest.attempts],
    }
    write_atomically(directory / RUN_FILE, (dumps(to_plain(content, RUN_FILE)) + "\n").encode())


def read_manifest(directory: Path) -> Manifest:
    """Read run.json.

    Raises:
        RunError: missing, unreadable or invalid; the message says why.
    """
    path = directory / RUN_FILE
    try:
        text = read_small(path, MAX_RUN_FILE_BYTES)
        try:
            content = loads(text)
        except ValueError as error:
            raise ValueError(f"{error}; a run is readable only with it: put back a copy") from None
        return _parse(content)
    except FileNotFoundError:
        raise RunError(
            f"{printable(directory)} holds no {RUN_FILE}; a run directory is made by "
            "SnapshotWriter, or was another directory meant?"
        ) from None
    except (ValueError, OSError) as error:
        raise RunError(f"{printable(path)}: {describe(error)}") from error


def _parse(content: Any) -> Manifest:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'is not a run file: "format" must be "{FORMAT}"')
    if content.get("version") != VERSION:
        raise ValueError(
            f"has format version {content.get('version')!r}; this release reads version {VERSION}: "
            "update blockell-format"
        )
    run_id = content.get("run_id")
    if not isinstance(run_id, str) or not run_id:
        raise ValueError('"run_id" is not a string')
    attempts = content.get("attempts")
    if not isinstance(attempts, list) or not attempts:
        raise ValueError('"attempts" is not a list with at least one entry')
    return Manifest(
        run_id=run_id,
        created=number(content, "created"),
        layers=parse_layer_table(content.get("layers")),
        attempts=tuple(_parse_attempt(entry, i) for i, entry in enumerate(attempts, start=1)),
    )


def _parse_attempt(entry: Any, expected: int) -> Attempt:
    if not isinstance(entry, dict):
        raise ValueError(f"attempt {expected} is not an object")
    if integer(entry, "attempt", 1, MAX_STEP) != expected:
        raise ValueError(f"attempt {expected} is numbered {entry['attempt']}")
    config = entry.get("config")
    if config is not None and not isinstance(config, dict):
        raise ValueError(f'"config" of attempt {expected} is not an object')
    return Attempt(
        attempt=expected,
        resume_step=integer(entry, "resume_step", 0, MAX_STEP),
        created=number(entry, "created"),
        world_size=integer(entry, "world_size", 1, MAX_WORLD_SIZE),
        config=from_plain(config),
    )


def integer(content: Mapping[str, Any], key: str, low: int, high: int) -> int:
    """An integer of a JSON object, or ValueError."""
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f'"{key}" is not an integer in [{low}, {high}]')
    return value


def number(content: Mapping[str, Any], key: str) -> float:
    """A finite number of a JSON object, or ValueError."""
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:
        raise ValueError(f'"{key}" is not a finite number')
    return float(value)
