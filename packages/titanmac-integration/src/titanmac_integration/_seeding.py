"""Independent streams of randomness from one seed."""

import hashlib

import torch


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator for ``name`` ("data", ...), the same for the same seed on every machine."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
