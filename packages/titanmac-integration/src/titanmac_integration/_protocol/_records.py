"""Results on disk: one JSON line per finished cell, written at once, read back to resume.

Several processes may add to one file: a line is written by a single append.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ._methods import Asked

RECORDS_FILE = "retention.jsonl"
SUMMARY_FILE = "retention.json"
VERSION = 1


def record_id(setting_key: str, asked: Asked, seed: int) -> str:
    """Names a cell; a cell whose id is in the file is finished."""
    dial = "auto" if asked.dial is None else f"{asked.dial:g}"
    rate = "" if asked.rate is None else f":{asked.rate:g}"
    return f"{setting_key}/{asked.method}@{asked.arch}{rate}={dial}/seed{seed}"


def append_record(directory: Path, record: dict[str, Any]) -> None:
    """Add one line to ``directory/retention.jsonl``."""
    directory.mkdir(parents=True, exist_ok=True)
    line = (json.dumps({"version": VERSION, **record}) + "\n").encode()
    file = directory / RECORDS_FILE
    if _is_torn(file):
        line = b"\n" + line
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Records of run directories or files; of several with one id the last counts.

    A line that a kill cut off is passed over.

    Raises:
        ValueError: a line is complete, but no record.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        file = path / RECORDS_FILE if path.is_dir() else path
        if not file.exists():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if not isinstance(record, dict) or record.get("version") != VERSION:
                raise ValueError(
                    f"{file}, line {number} must be a record of version {VERSION}; it comes from "
                    "another program or version."
                )
            records[record["id"]] = record
    return list(records.values())


def _is_torn(file: Path) -> bool:
    """Whether the file ends in the middle of a line."""
    if not file.exists() or file.stat().st_size == 0:
        return False
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"
