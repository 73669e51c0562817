# mypy: ignore-errors
"""The names of Gluon that the kernels use, in one place: they change from release to release."""

from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma_init as accumulator,  # exists, but is in no release's __all__
)
from triton.language.extra.cuda import gdc_launch_dependents as let_the_next_one_start
from triton.language.extra.cuda import gdc_wait as wait_for_the_one_before

__all__ = [
    "accumulator",
    "fence_async_shared",
    "let_the_next_one_start",
    "mbarrier",
    "tma",
    "wait_for_the_one_before",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
