"""Texts that benchmarks learn: the built-in prose, files, and a long one that every Python has."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

from titanmac_integration._data._prose import load_prose

LEFT_OUT = {
    *("test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"),
    "pydoc_data",  # which holds the prose
}


def load_text(name: str) -> bytes:
    """``prose``, ``stdlib``, or the file of that name."""
    if name == "prose":
        return load_prose().encode()
    return load_stdlib() if name == "stdlib" else Path(name).read_bytes()


def load_stdlib() -> bytes:
    """The modules of the running Python's standard library, some 10 MB, in an order drawn once."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in root.rglob("*.py") if not LEFT_OUT & set(f.relative_to(root).parts)]
    files.sort()
    random.Random(0).shuffle(files)
    return b"\n".join(file.read_bytes() for file in files)
