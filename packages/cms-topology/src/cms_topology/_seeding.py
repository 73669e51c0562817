"""Random generators that are the same on every rank and after every resume."""

from __future__ import annotations

import hashlib

import torch


def decision_generator(seed: int, global_step: int, layer_name: str) -> torch.Generator:
    """Generator of one layer's decision at one step.

    It depends on nothing but its arguments, so ranks need not communicate to draw the same
    newborn blocks, and a resumed run draws what the first one drew. It lives on the CPU, so the
    topology does not depend on the device either.
    """
    message = f"{seed}/{global_step}/{layer_name}".encode()
    digest = hashlib.blake2b(message, digest_size=8).digest()
    # torch takes seeds below 2**63 on every device
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
