"""Every global random stream of a process, taken and put back."""

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def seed_global_random_state(seed: int) -> None:
    """Seed Python's, numpy's (where it is loaded) and torch's generators, on all devices."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def global_random_state(device: torch.device) -> dict[str, Any]:
    """States of Python's, numpy's (where it is loaded), torch's and the device's generators."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, gauss = numpy.random.get_state()
        # through int64: safetensors of older torch versions have no uint32
        keys = torch.from_numpy(keys.astype("int64"))
        state["numpy"] = [str(kind), keys, int(position), int(has_gauss), float(gauss)]
    return state


def set_global_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what :func:`global_random_state` took."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if "numpy" in state:
        import numpy

        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
