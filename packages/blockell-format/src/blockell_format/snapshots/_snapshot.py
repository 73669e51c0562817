"""One recorded topology decision."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ._header import Header
from ._json import loads
from ._layers import DTYPES, FIELDS, LayerInfo, LayerSnapshot, check_field, partial_snapshot
from ._problems import Problem, SnapshotError, describe, printable

_SUMS = re.compile(f"[0-9a-f]{{{8 * len(FIELDS)}}}")
_NUMPY_TYPES = {"I32": "int32", "I64": "int64", "F32": "float32", "BOOL": "bool"}


def tensor_name(layer: str, field: str) -> str:
    """Name of a tensor in the file."""
    return f"{layer}/{field}"


class Snapshot:
    """One snapshot file; made by `Run.snapshot`. Layers are read when asked for."""

    def __init__(
        self,
        path: Path,
        header: Header,
        layers: dict[str, LayerInfo],
        report: Callable[[Problem], None],
    ) -> None:
        self.path = path
        self._header = header
        self._layers = layers
        self._report = report

    @property
    def step(self) -> int:
        """Optimizer step of the decision."""
        return self._header.step

    @property
    def attempt(self) -> int:
        """Start of the training job that wrote it, from 1."""
        return self._header.attempt

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._header.world_size

    @property
    def created(self) -> float:
        """Unix time of writing."""
        return self._header.created

    @property
    def swap_counts(self) -> dict[str, int]:
        """Blocks swapped at this decision, per layer."""
        return self._header.swaps_by_layer(self._layers)

    @property
    def checksums(self) -> dict[str, tuple[str, ...]]:
        """Topology checksum of every rank, per layer; ranks agree where all are equal."""
        return self._header.sums_by_layer(self._layers)

    def layer(self, name: str, fields: Collection[str] = FIELDS) -> LayerSnapshot:
        """Read one layer; no other layer is touched.

        Scores that are not finite are kept and listed in `Run.problems`.

        Args:
            name: a layer of the run.
            fields: what to read; touching another field of the result is an AttributeError.

        Raises:
            ValueError: no such layer or field.
            SnapshotError: (a ValueError) the file is gone or damaged, or the content breaks a
                rule of the format: wrong type or shape, columns out of range, ...
        """
        check_names(self._layers, name, fields)
        info = self._layers[name]
        try:
            arrays = _read_fields(self.path, info, list(self._layers).index(name), fields)
        except (ValueError, OSError, SafetensorError) as error:
            reason = f"layer {name!r} dropped: {describe(error)}"
            self._report(Problem(self.path, reason))
            raise SnapshotError(f"{printable(self.path)}: {reason}") from error
        if "block_score" in arrays:
            odd = int(np.count_nonzero(~np.isfinite(arrays["block_score"])))
            if odd:
                reason = f"layer {name!r}: block_score holds {odd} non-finite values; kept"
                self._report(Problem(self.path, reason))
        return partial_snapshot(arrays)

    def __repr__(self) -> str:
        return f"Snapshot(step={self.step}, attempt={self.attempt}, path={printable(self.path)!r})"


def check_names(layers: dict[str, LayerInfo], name: str, fields: Collection[str]) -> None:
    """Raise ValueError for a layer or field that does not exist."""
    if name not in layers:
        known = ", ".join(layers) or "none"
        raise ValueError(f"name (={name!r}) is not a layer of this run; layers: {known}.")
    unknown = [field for field in fields if field not in FIELDS]
    if isinstance(fields, str) or unknown:
        raise ValueError(f"fields (={fields!r}) must be a collection out of {', '.join(FIELDS)}.")


def _read_fields(
    path: Path, info: LayerInfo, index: int, fields: Collection[str]
) -> dict[str, npt.NDArray[Any]]:
    """Some arrays of the layer that is `index` in the layer table."""
    arrays = {}
    with safe_open(str(path), framework="np") as file:
        sums = _sums_of(file.metadata() or {}, index)
        for field in fields:
            key = tensor_name(info.name, field)
            part = file.get_slice(key)
            # types and sizes are checked before anything is loaded
            dtype, shape = _NUMPY_TYPES.get(part.get_dtype()), part.get_shape()
            if dtype is None or np.dtype(dtype) not in DTYPES[field]:
                raise ValueError(f"{field} has dtype {part.get_dtype()}")
            if shape != [info.R, info.K]:
                raise ValueError(f"{field} has shape {shape} instead of {[info.R, info.K]}")
            array = file.get_tensor(key)
            if sums:
                _check_sum(field, array, sums[field])
            if dtype == "bool":  # bytes other than 0 and 1 would break numpy's arithmetic
                array = array.view(np.uint8) != 0
            check_field(info, field, array)
            arrays[field] = array
    return arrays


def _sums_of(metadata: dict[str, str], index: int) -> dict[str, str]:
    """CRC-32 by field of one layer, in hexadecimal; empty where the writer gave none."""
    if "crc32" not in metadata:
        return {}
    content = loads(metadata["crc32"])
    sums = content[index] if isinstance(content, list) and index < len(content) else None
    if not isinstance(sums, str) or not _SUMS.fullmatch(sums):
        raise ValueError('the metadata hold no valid "crc32" of it')
    return {field: sums[8 * i : 8 * i + 8] for i, field in enumerate(FIELDS)}


def _check_sum(field: str, array: npt.NDArray[Any], expected: str) -> None:
    in_file = np.asarray(array, array.dtype.newbyteorder("<"))
    found = f"{zlib.crc32(in_file.data):08x}"
    if found != expected:
        raise ValueError(
            f"{field} has CRC-32 {found}, was written with {expected}: the file was damaged "
            "since; restore it from a copy"
        )
