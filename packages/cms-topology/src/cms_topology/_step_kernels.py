"""Level 0 of many layers on one GPU: two kernels, and little for the host to do before them.

In a training that is not captured in a graph the host is what a step waits for. So everything that
stays from step to step is looked up once, and a step only compares identities.

Legend: L layers, R block rows, K slots per row, B tile side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cms_topology._accumulate import refuse_foreign_values
from cms_topology._averages import Averages
from cms_topology._blocks import kernels, kernels_for

if TYPE_CHECKING:
    from cms_topology._linear import CMSBlockLinear


class StepKernels:
    """What the kernels of a plain step are told.

    Args:
        layers: at least one, of any kind.
    """

    def __init__(self, layers: Sequence[CMSBlockLinear]) -> None:
        for layer in layers:
            refuse_foreign_values(layer)
        self._layers = list(layers)
        self._held = _tensors(layers)
        self._fits = _one_launch(layers)
        if not self._fits:
            return
        self._values = self._held[::4]
        self._probes = [p for x in layers for p in (x._probe, x._fisher_probe) if p is not None]
        self._shapes = [values.shape for values in self._values]
        self._dtype, self._device = self._values[0].dtype, self._values[0].device
        counts = [values.shape[0] * values.shape[1] for values in self._values]
        self._norms = torch.empty(sum(counts), dtype=torch.float32, device=self._device)
        self._finite = torch.empty((), dtype=torch.int8, device=self._device)
        starts = list(itertools.accumulate(counts, initial=0))[:-1]
        self._places = list(zip(counts, starts, strict=True))
        state = [Averages(*self._held[i + 1 : i + 4]) for i in range(0, len(self._held), 4)]
        self._kernels = kernels()
        assert self._kernels is not None
        self._rows = self._kernels.rows_to_advance(state, self._norms.split(counts))
        self._decay = layers[0].scorer.config.ema_decay
        self._addresses: list[int] = []
        self._gradients: tuple[tuple[int, ...], ...] = ()

    def holds(self) -> bool:
        """Whether the layers' tensors are still those that were looked up."""
        return all(map(is_, _tensors(self._layers), self._held))

    def accumulate(self) -> Tensor | None:
        """`accumulate_scores`, to the bit; None where this is no plain step of such layers.

        That is one in which every layer has a gradient and none has statistics of absent blocks.
        """
        if not self._fits or any(p.grad is not None for p in self._probes):
            return None
        addresses, dtypes = [], set()
        for values, shape in zip(self._values, self._shapes, strict=True):
            grad = values.grad
            if grad is None or grad.shape != shape or not grad.is_contiguous():
                return None
            addresses.append(grad.data_ptr())
            dtypes.add(grad.dtype)
        if dtypes != {self._dtype} or any(address % 16 for address in addresses):
            return None
        if addresses != self._addresses:  # mostly they are those of the step before
            self._addresses = addresses
            places = zip(addresses, self._places, strict=True)
            self._gradients = tuple((at, *place) for at, place in places)
        assert self._kernels is not None
        self._finite.fill_(1)
        self._kernels.launch_norms(
            self._gradients, self._norms, self._finite, self._dtype, self._shapes[0][-1]
        )
        finite = self._finite.view(torch.bool)
        self._kernels.launch_advance(self._rows, finite, self._decay)
        return finite


def _one_launch(layers: Sequence[CMSBlockLinear]) -> bool:
    """Whether one launch can treat these layers: alike but for their sizes, on one GPU."""
    if not layers[0].values.is_cuda or kernels() is None:
        return False
    kinds = {(x.values.device, x.values.dtype, x.B, x.scorer.config.ema_decay) for x in layers}
    held = _tensors(layers)
    return (
        len(kinds) == 1
        and all(x.scorer.config.keep_score not in ("taylor", "loss") for x in layers)
        and all(x.values.shape == (x.R, x.K, x.B, x.B) for x in layers)
        and kernels_for(*held[::4])
        and all(t.is_contiguous() for t in held)
    )


def values_and_ages(layers: Iterable[CMSBlockLinear]) -> list[tuple[Tensor, Tensor, int]]:
    """Values, block ages and live slots per row of every layer."""
    return [
        (x._parameters["values"], x._modules["scorer"]._buffers["block_age"], x.num_live)  # type: ignore[union-attr, misc]
        for x in layers
    ]


def _tensors(layers: Sequence[CMSBlockLinear]) -> list[Tensor]:
    """Values, moving average, its weight and ages of every layer, one after the other."""
    found: list[Tensor] = []
    for layer in layers:
        # a module's attributes take several times as long
        held = layer._modules["scorer"]._buffers  # type: ignore[union-attr]
        values = layer._parameters.get("values")  # not there while it is pruned
        found += (values, held["score_ema"], held["score_weight"], held["block_age"])  # type: ignore[arg-type]
    return found
