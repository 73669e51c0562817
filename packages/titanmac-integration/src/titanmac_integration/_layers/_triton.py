"""Whether Triton is there: kernels are imported where they run, since a CPU needs none."""

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Looked for once, without importing it."""
    return importlib.util.find_spec("triton") is not None
