# mypy: ignore-errors
"""A Triton kernel that corrects the steps of young blocks, and reads only the ages of others.

Legend: L layers, R block rows, K slots per row (live ones first), B tile side, E = B*B elements of
a block.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from cms_topology._addresses import address_table
from cms_topology._block_kernels import ELEMENTS, KINDS
from cms_topology._devices import on


@triton.jit
def _correct_young(
    table_ptr,  # int64 [L, 7]: addresses of values, mean, square [R, K, E], int32 age [R, K]; R*K,
    # K, live
    step_ptr,  # float32 [L], steps of the whole parameter
    last_ptr,  # float32 [L], the same at the last call
    rate_ptr,  # float32, or None
    rate,  # the learning rate without rate_ptr
    beta1,
    beta2,
    eps,
    grown_up,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECE: tl.constexpr,
    VALUES: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARE: tl.constexpr,
):
    layer = tl.program_id(2)
    row = table_ptr + layer * 7
    first = tl.program_id(0) * SLOTS
    slots = tl.load(row + 4).to(tl.int32)
    K = tl.load(row + 5).to(tl.int32)
    live = tl.load(row + 6).to(tl.int32)
    age_ptr = tl.load(row + 3).to(tl.pointer_type(tl.int32))
    t = tl.load(step_ptr + layer)
    slot = first + tl.arange(0, SLOTS)
    there = (slot < slots) & (slot % K < live)
    age = tl.load(age_ptr + slot, there, other=2**30).to(tl.float32)
    # a gradient scaler may have skipped the step: then there is nothing to correct
    youngest = tl.where(t > tl.load(last_ptr + layer), tl.min(age, 0), 2.0**30)
    limit = tl.minimum(t, grown_up)
    if youngest < limit:
        values_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(VALUES)), 16)
        mean_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(MEAN)), 16)
        square_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(SQUARE)), 16)
        if rate_ptr is not None:
            rate = tl.load(rate_ptr).to(tl.float32)
        for i in range(SLOTS):
            one = first + i
            inside = (one < slots) & (one % K < live)
            its_age = tl.load(age_ptr + one, inside, other=2**30).to(tl.float32)
            its_age = tl.maximum(tl.minimum(its_age, t), 1.0)
            if its_age < limit:
                element = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
                at = one.to(tl.int64) * E + element
                mean = tl.load(mean_ptr + at).to(tl.float32)
                root = tl.sqrt(tl.load(square_ptr + at).to(tl.float32))
                log1, log2 = tl.log(beta1), tl.log(beta2)
                made = mean / (1.0 - tl.exp(t * log1))
                made /= root / tl.sqrt(1.0 - tl.exp(t * log2)) + eps
                meant = mean / (1.0 - tl.exp(its_age * log1))
                meant /= root / tl.sqrt(1.0 - tl.exp(its_age * log2)) + eps
                value = tl.load(values_ptr + at).to(tl.float32) + rate * (made - meant)
                tl.store(values_ptr + at, value.to(VALUES))


class YoungBlocks:
    """Layers that one launch corrects; see `NewbornStepCorrection`.

    Args:
        blocks: of every layer, values [R, K, B, B], changed in place, both moments of that shape,
            ages int32 [R, K], and live slots per row; contiguous, equal dtypes and tile sides.
    """

    def __init__(self, blocks: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, int]]) -> None:
        values, mean, square, _, _ = blocks[0]
        E = values.shape[-1] ** 2
        piece, slots = min(E, ELEMENTS), max(1, ELEMENTS // E)
        self._device = values.device
        self._rows = tuple(
            (
                *(tensor.data_ptr() for tensor in (values, mean, square, age)),
                age.numel(),
                age.shape[1],
                live,
            )
            for values, mean, square, age, live in blocks
        )
        most = max(row[4] for row in self._rows)
        self._grid = (triton.cdiv(most, slots), E // piece, len(blocks))
        self._settings = {
            "E": E,
            "SLOTS": slots,
            "PIECE": piece,
            "VALUES": KINDS[values.dtype],
            "MEAN": KINDS[mean.dtype],
            "SQUARE": KINDS[square.dtype],
        }

    def correct(
        self,
        steps: Tensor,
        lasts: Tensor,
        rate: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        grown_up: float,
    ) -> None:
        """Launch, for layers that stand where they stood.

        `steps` and `lasts` float32 [L]: Adam's steps, and those at the last call. A `rate` that is
        a tensor is read on the device, if it lies there.
        """
        if isinstance(rate, Tensor) and rate.is_cpu:
            rate = float(rate)
        in_memory = isinstance(rate, Tensor)
        with on(self._device):
            _correct_young[self._grid](
                address_table(self._rows, self._device),
                steps,
                lasts,
                rate if in_memory else None,
                0.0 if in_memory else rate,
                *betas,
                eps,
                grown_up,
                **self._settings,
            )
