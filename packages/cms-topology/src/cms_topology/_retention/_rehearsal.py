"""Rehearsal: going over old tasks beside a new one, on what the model wrote itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cms_topology._retention._answers import LOG_PROBS, divergence_from_answers
from cms_topology._retention._consolidate import LossFn, default_loss


class Rehearsal:
    """The loss on a few sequences of every old task, to be added to a new task's loss.

    The sequences are best written by the model itself at the end of each task (`sample_tokens`):
    then no data need be kept (self-generated replay: Robins 1995, "Catastrophic forgetting,
    rehearsal and pseudorehearsal"). By itself rehearsal repairs what was forgotten, it does not
    prevent it: the old tasks dip while the new one begins. With the updates damped along the old
    tasks' inputs they hardly do, and the damping may be weak and let go in the course of the new
    task, because what leaks is repaired:

    ```python
    guard = RetentionGuard(model, optimizer, memory, drift=None, eps=0.3, release=steps)
    rehearsal = Rehearsal(model, [with_answers(model, {"input_ids": written})])
    ...
    (loss + rehearsal.loss()).backward()
    optimizer.step()
    ```

    Args:
        model: wrapped by DDP or torch.compile or not.
        kept: one entry per old task: tensors by name, whose first dimension counts sequences.
        weight: of the loss of each old task. Default: 3 where answers are kept, which ask for
            nothing as long as nothing has changed, else 0.3. Less leaves more to the new task.
        rows: sequences per task and step, drawn with replacement.
        loss_fn: (model, batch) -> scalar, the mean over tokens. Default: the divergence from the
            answers, where they are kept (`with_answers`), else `model(**batch)["loss"]`.
        generator: on the device of `kept`; default: one of a fixed seed. A step that is captured in
            a graph needs it registered there.

    Raises:
        ValueError: no task, a task without sequences or with unequally many, or a setting outside
            its range.
    """

    def __init__(
        self,
        model: nn.Module,
        kept: Sequence[dict[str, Tensor]],
        *,
        weight: float | None = None,
        rows: int = 16,
        loss_fn: LossFn | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not kept:
            raise ValueError(f"kept (={kept!r}) must hold at least one task; pass what it wrote.")
        for number, batch in enumerate(kept):
            counts = {len(tensor) for tensor in batch.values()}
            if len(counts) != 1 or 0 in counts:
                raise ValueError(
                    f"kept[{number}] (of {sorted(counts)} sequences) must hold tensors of equally "
                    "many sequences, at least one."
                )
        if weight is not None and not weight >= 0:
            raise ValueError(f"weight (={weight}) must be 0 or more.")
        if rows < 1:
            raise ValueError(f"rows (={rows}) must be at least 1.")
        self.model, self.kept = model, [dict(batch) for batch in kept]
        self._weight, self.rows = weight, rows
        self.loss_fn = _default_loss if loss_fn is None else loss_fn
        device = next(iter(self.kept[0].values())).device
        if generator is None:
            generator = torch.Generator(device).manual_seed(0)
        self.generator = generator

    @property
    def weight(self) -> float:
        """Of the loss of each old task."""
        if self._weight is not None:
            return self._weight
        return 3.0 if all(LOG_PROBS in batch for batch in self.kept) else 0.3

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(t.numel() * t.element_size() for batch in self.kept for t in batch.values())

    def loss(self) -> Tensor:
        """Weighted loss on freshly drawn sequences of all old tasks, 0-d; no host synchronisation.

        Autocast and the scaling of gradients are the caller's, as for the loss it is added to.
        """
        drawn = [(self._draw(batch), 1) for batch in self.kept]
        if self.loss_fn is _default_loss:
            drawn = _together(drawn)
        total: Any = 0.0
        for batch, tasks in drawn:
            total = total + self.weight * tasks * self.loss_fn(self.model, batch)
        result: Tensor = total
        return result

    def _draw(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        some = next(iter(batch.values()))
        chosen = torch.randint(
            len(some), (self.rows,), generator=self.generator, device=some.device
        )
        return {name: tensor[chosen] for name, tensor in batch.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept, as "task.name", and how far its drawing has come: tensors by name."""
        kept = {
            f"{number}.{name}": tensor
            for number, batch in enumerate(self.kept)
            for name, tensor in batch.items()
        }
        return {**kept, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` was taken of, whatever this one held, and draw on from there.

        Raises:
            ValueError: `state` is not of a rehearsal.
        """
        if "generator" not in state or "0." not in {name[:2] for name in state}:
            raise ValueError(
                f"state (of {sorted(state)}) must hold a generator and the tensors of at least one "
                "task; pass what Rehearsal.state_dict returned."
            )
        kept: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            number, dot, name = key.partition(".")
            if dot:
                kept.setdefault(int(number), {})[name] = tensor.to(self.generator.device)
        self.kept = [kept[number] for number in sorted(kept)]
        self.generator.set_state(state["generator"].cpu())


def _default_loss(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return (divergence_from_answers if LOG_PROBS in batch else default_loss)(model, batch)


def _together(drawn: list[tuple[dict[str, Tensor], int]]) -> list[tuple[dict[str, Tensor], int]]:
    """Tasks whose batches look alike in one pass, and how many tasks that is.

    Only where all answers count: then the mean over several tasks is the mean of their means.
    """
    alike: dict[Any, list[dict[str, Tensor]]] = {}
    for number, (batch, _) in enumerate(drawn):
        look: Any = tuple((n, t.shape, t.dtype) for n, t in sorted(batch.items()))
        alike.setdefault(look if LOG_PROBS in batch else number, []).append(batch)
    return [
        ({name: torch.cat([b[name] for b in group]) for name in group[0]}, len(group))
        for group in alike.values()
    ]
