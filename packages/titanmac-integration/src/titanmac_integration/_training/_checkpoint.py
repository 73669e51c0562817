"""Checkpoints of a training: directories that are complete or absent, the last few kept.

``checkpoints/step-00000100/`` holds ``model.safetensors`` and ``model.json`` (a model that
:func:`load_checkpoint` takes) and ``state.safetensors`` and ``state.json`` (everything else that
continuing needs, with the digests of all files). Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from blockell_format.snapshots import write_atomically
from titanmac_integration._model._checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    save_checkpoint,
    write_json,
)
from titanmac_integration._model._titanmac import TitanMAC

from ._tree import decode_tree, encode_tree

CHECKPOINTS_DIR = "checkpoints"
STATE_FILE = "state.json"
TENSORS_FILE = "state.safetensors"
TEMPORARY_PREFIX = ".tmp-"
FORMAT, VERSION = "titanmac-training", 1
_NAME = re.compile(r"step-([0-9]{8,16})")
_CHECKED_FILES = (CONFIG_FILE, WEIGHTS_FILE, TENSORS_FILE)


class TrainingCheckpoint(NamedTuple):
    """What a checkpoint holds, apart from configurations."""

    step: int
    """Optimizer steps it was taken after."""
    model: dict[str, Tensor]
    """The model's ``state_dict``."""
    state: Any
    """Nested state, as it was given to :meth:`CheckpointStore.save`."""
    info: dict[str, Any]
    """What was to be found without reading tensors, as it was given."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: where they are; made when the first is saved.
        keep: how many of the last ones stay; older ones are deleted.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep (={keep!r}) must be an integer of at least 1.")
        self.directory, self.keep = Path(directory), keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = (_NAME.fullmatch(path.name) for path in self.directory.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int | None = None) -> Path:
        """The directory of a checkpoint; the last one's without ``step``.

        Raises:
            FileNotFoundError: there is none; names those there are.
        """
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint to continue from.")
        if step is not None and step not in steps:
            raise FileNotFoundError(
                f"{self.directory} holds no checkpoint of step {step}; there are "
                f"{', '.join(map(str, steps))}."
            )
        return self._path(steps[-1] if step is None else step)

    def save(self, step: int, model: TitanMAC, *, state: Any, info: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then delete the older ones that are too many.

        Args:
            step: optimizer steps so far.
            model: the model.
            state: dicts, lists, numbers, strings, None and tensors, nested as you like.
            info: what JSON can hold.

        Raises:
            OSError: it could not be written, on a full disk for instance; older checkpoints are
                as they were.
        """
        target = self._path(step)
        temporary = self.directory / f"{TEMPORARY_PREFIX}{os.getpid()}-{target.name}"
        try:
            self._clean()
            temporary.mkdir(parents=True)
            self._write(temporary, step, model, state, info)
            self._replace(temporary, target)
            _sync_directory(self.directory)
            self._clean()
        except OSError as error:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
            kept = ", ".join(map(str, self.steps())) or "none"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.directory}: {error}. "
                f"Complete checkpoints there: {kept}."
            ) from error
        for old in self.steps():
            if old < step and old not in self.steps()[-self.keep :]:
                shutil.rmtree(self._path(old), ignore_errors=True)
        return target

    def supersede(self, step: int) -> None:
        """Take checkpoints of later steps out of the list, where a run went back to ``step``.

        They are renamed to ``superseded-...``, not deleted.
        """
        for later in self.steps():
            if later > step:
                name = free = f"superseded-{later:08d}"
                number = 1
                while (self.directory / free).exists():
                    number += 1
                    free = f"{name}-{number}"
                os.rename(self._path(later), self.directory / free)

    def _replace(self, temporary: Path, target: Path) -> None:
        """Give a finished directory its name, which an older one may have."""
        aside = self.directory / f"{TEMPORARY_PREFIX}{os.getpid()}-replaced"
        occupied = target.exists()
        if occupied:
            os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            if occupied:
                os.rename(aside, target)
            raise

    def _write(
        self, directory: Path, step: int, model: TitanMAC, state: Any, info: Mapping[str, Any]
    ) -> None:
        save_checkpoint(model, directory, info={"step": step})
        plain, tensors = encode_tree(state)
        write_atomically(directory / TENSORS_FILE, save(tensors))
        files = {name: _digest((directory / name).read_bytes()) for name in _CHECKED_FILES}
        content = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
        write_json(directory / STATE_FILE, {**content, "info": dict(info), "state": plain})

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _clean(self) -> None:
        """Remove what a killed process left half-written."""
        for leftover in self.directory.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def read_training_info(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``info`` of a checkpoint, with its ``step``, without reading tensors.

    Raises:
        ValueError: it is no checkpoint, or cannot be read.
    """
    content = _read_state_file(Path(directory))
    return {**content["info"], "step": int(content["step"])}


def read_training_checkpoint(directory: str | os.PathLike[str]) -> TrainingCheckpoint:
    """All of a checkpoint, checked against its digests.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    directory = Path(directory)
    content = _read_state_file(directory)
    files = {}
    for name in _CHECKED_FILES:
        try:
            data = (directory / name).read_bytes()
        except OSError as error:
            raise ValueError(_unusable(directory, f"{name} cannot be read ({error})")) from error
        if _digest(data) != content["files"].get(name):
            raise ValueError(
                _unusable(directory, f"{name} ({len(data)} bytes) is not what was written")
            )
        files[name] = data
    try:
        state = decode_tree(content["state"], load(files[TENSORS_FILE]))
        model = load(files[WEIGHTS_FILE])
    except Exception as error:  # safetensors raises its own type
        raise ValueError(_unusable(directory, f"its tensors cannot be read ({error})")) from error
    return TrainingCheckpoint(int(content["step"]), model, state, dict(content["info"]))


def _read_state_file(directory: Path) -> dict[str, Any]:
    path = directory / STATE_FILE
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(_unusable(directory, f"{STATE_FILE} cannot be read ({error})")) from error
    except ValueError as error:
        raise ValueError(_unusable(directory, f"{STATE_FILE} is no JSON ({error})")) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(_unusable(directory, f"{STATE_FILE} is not of format {FORMAT!r}"))
    if content.get("version") != VERSION:
        version = content.get("version")
        raise ValueError(
            _unusable(directory, f"version {version!r} is not known, this is version {VERSION}")
        )
    if not {"step", "files", "info", "state"} <= content.keys():
        raise ValueError(_unusable(directory, f"{STATE_FILE} is incomplete"))
    return content


def _unusable(directory: Path, why: str) -> str:
    others = CheckpointStore(directory.parent).steps()
    steps = [str(step) for step in others if directory.name != f"step-{step:08d}"]
    rest = f" Other checkpoints: steps {', '.join(steps)}." if steps else ""
    return f"checkpoint {directory} cannot be used: {why}.{rest}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
