"""The header of a snapshot file: read alone, so that thousands of files list in seconds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ._files import MAX_STEP, open_regular, read_exactly
from ._json import dumps, loads
from ._manifest import MAX_WORLD_SIZE, Manifest, layer_table, parse_layer_table

FORMAT = "blockell-snapshot"
VERSION = "1"
MAX_HEADER_BYTES = 16 << 20
_FIRST_READ_BYTES = 32 << 10
_METADATA_FIRST = '{"__metadata__":'
_DECODER = json.JSONDecoder()
_DIGITS = re.compile("[0-9]{1,19}")


RankSums: TypeAlias = str | tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """What the metadata of one snapshot says, checked against the run."""

    step: int
    attempt: int
    world_size: int
    created: float
    swap_counts: tuple[int, ...]
    """Per layer, in the order of the layer table."""
    checksums: tuple[RankSums, ...]
    """Per layer one string per rank, or a single string where all ranks agree."""

    def swaps_by_layer(self, layers: Iterable[str]) -> dict[str, int]:
        """Swap counts by layer name."""
        return dict(zip(layers, self.swap_counts, strict=True))

    def sums_by_layer(self, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Checksums by layer name, always one per rank."""
        size = self.world_size
        return {
            name: (sums,) * size if isinstance(sums, str) else sums
            for name, sums in zip(layers, self.checksums, strict=True)
        }


def build_metadata(
    manifest: Manifest, header: Header, data_bytes: int, crc32: list[str]
) -> dict[str, str]:
    """The metadata of a snapshot: strings only, as safetensors wants.

    `crc32` is, per layer of the table, the CRC-32 of every field in eight hexadecimal digits.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "run_id": manifest.run_id,
        "step": str(header.step),
        "attempt": str(header.attempt),
        "world_size": str(header.world_size),
        "created": repr(header.created),
        "data_bytes": str(data_bytes),
        "layers": layer_table(manifest.layers),
        "checksums": dumps(header.checksums),
        "swap_counts": dumps(header.swap_counts),
        "crc32": dumps(crc32),
    }


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors.

    Raises:
        ValueError: not a safetensors file, an oversized header, truncated.
        OSError: it cannot be read.
    """
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        start = read_exactly(fd, min(size, _FIRST_READ_BYTES))
        if len(start) < 8:
            raise ValueError(f"is truncated: {len(start)} bytes are no safetensors file")
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"is not a snapshot: its header would have {length} bytes, "
                f"at most {MAX_HEADER_BYTES} are read"
            )
        if size < 8 + length:
            raise ValueError(f"is truncated: {size} bytes, the header alone needs {8 + length}")
        start += read_exactly(fd, 8 + length - len(start))
    metadata = _metadata_of(start[8 : 8 + length])
    data_bytes = _whole(metadata, "data_bytes", 0, 1 << 60)
    if size != 8 + length + data_bytes:
        raise ValueError(
            f"is truncated or damaged: {size} bytes instead of {8 + length + data_bytes}"
        )
    return metadata


def _metadata_of(header: bytes) -> dict[str, str]:
    try:
        text = header.decode()
        if text.startswith(_METADATA_FIRST):
            # the tensor table behind it is read by safetensors when a layer is asked for
            metadata, _ = _DECODER.raw_decode(text, len(_METADATA_FIRST))
        else:
            whole = loads(text)
            metadata = whole.get("__metadata__") if isinstance(whole, dict) else None
    except (ValueError, RecursionError):
        raise ValueError("is not a snapshot: its header is not JSON") from None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("is not a snapshot: its header has no metadata of strings")
    if metadata.get("format") != FORMAT:
        raise ValueError(f'is not a snapshot: its "format" is not "{FORMAT}"')
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"has format version {metadata.get('version')!r}; this release reads version "
            f"{VERSION}: update blockell-format"
        )
    return metadata


def parse_header(metadata: Mapping[str, str], manifest: Manifest, table: str) -> Header:
    """Check metadata against the run it lies in; `table` is the run's layer table as text.

    Raises:
        ValueError: metadata missing or invalid, or of another run.
    """
    if metadata.get("run_id") != manifest.run_id:
        raise ValueError("belongs to another run: its run id differs from the one in run.json")
    layers = metadata.get("layers", "")
    if layers != table and parse_layer_table(loads(layers)) != manifest.layers:
        raise ValueError("has another layer table than run.json")
    world_size = _whole(metadata, "world_size", 1, MAX_WORLD_SIZE)
    swap_counts = _list(metadata, "swap_counts", manifest)
    if not set(map(type, swap_counts)) <= {int} or min(swap_counts, default=0) < 0:
        raise ValueError('has "swap_counts" in its metadata that are not counts')
    checksums = _list(metadata, "checksums", manifest)
    if not set(map(type, checksums)) <= {str}:
        checksums = [_rank_sums(sums, world_size) for sums in checksums]
    try:
        created = float(metadata["created"])
    except (KeyError, ValueError):
        raise ValueError('has no valid "created" in its metadata') from None
    return Header(
        step=_whole(metadata, "step", 0, MAX_STEP),
        attempt=_whole(metadata, "attempt", 1, MAX_STEP),
        world_size=world_size,
        created=created if abs(created) < 1e15 else 0.0,
        swap_counts=tuple(swap_counts),
        checksums=tuple(checksums),
    )


def _whole(metadata: Mapping[str, str], key: str, low: int, high: int) -> int:
    text = metadata.get(key, "")
    if not _DIGITS.fullmatch(text) or not low <= int(text) <= high:
        raise ValueError(f'has no valid "{key}" in its metadata')
    return int(text)


def _list(metadata: Mapping[str, str], key: str, manifest: Manifest) -> list[Any]:
    """A JSON list with one entry per layer."""
    try:
        content = loads(metadata[key])
    except (KeyError, ValueError):
        content = None
    if not isinstance(content, list) or len(content) != len(manifest.layers):
        raise ValueError(f'has no valid "{key}" for every layer in its metadata')
    return content


def _rank_sums(sums: Any, world_size: int) -> RankSums:
    if isinstance(sums, str):
        return sums
    if (
        not isinstance(sums, list)
        or len(sums) != world_size
        or not all(isinstance(entry, str) for entry in sums)
    ):
        raise ValueError('has "checksums" in its metadata that are not one string per rank')
    return tuple(sums)
