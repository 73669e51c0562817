"""Batches, drawn while the device is still at work on the one before."""

from typing import NamedTuple

import torch
from torch import Tensor

from titanmac_integration._data._tasks import Batch, Mixture, Task


class _Ahead(NamedTuple):
    """A batch that nobody has asked for yet."""

    of: tuple[Task | Mixture, int, int]
    batch: Batch
    state: Tensor
    """The generator's before it was drawn."""


class BatchStream:
    """Batches from a generator; one may be drawn ahead, which changes no batch and no state.

    Args:
        generator: on the CPU.
        device: the model's; batches for a GPU are put into pinned memory.
    """

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self._generator, self._device = generator, device
        self._ahead: _Ahead | None = None

    def next(self, task: Task | Mixture, batch_size: int, seq_len: int) -> Batch:
        """The next batch of ``task``."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            if ahead.of == (task, batch_size, seq_len):
                return ahead.batch
            self._generator.set_state(ahead.state)
        return self._draw(task, batch_size, seq_len)

    def draw_ahead(self, task: Task | Mixture, batch_size: int, seq_len: int) -> None:
        """Draw what will probably be asked for next."""
        state = self.get_state()
        self._generator.set_state(state)
        batch = self._draw(task, batch_size, seq_len)
        self._ahead = _Ahead((task, batch_size, seq_len), batch, state)

    def get_state(self) -> Tensor:
        """That of the generator after the batches that were asked for."""
        return self._generator.get_state() if self._ahead is None else self._ahead.state

    def set_state(self, state: Tensor) -> None:
        """Go on after the batches that had been asked for then."""
        self._ahead = None
        self._generator.set_state(state)

    def _draw(self, task: Task | Mixture, batch_size: int, seq_len: int) -> Batch:
        batch = task.batch(batch_size, seq_len, self._generator)
        if self._device.type != "cuda":
            return batch
        # pinned, or the host would wait for all steps before when it copies them
        return Batch(*(tensor.pin_memory() for tensor in batch))
