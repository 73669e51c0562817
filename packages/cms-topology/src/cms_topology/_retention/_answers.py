"""What a model answers on the sequences it will rehearse: whole distributions, not one draw each.

Legend: P sequences, T positions of one, V classes, k classes kept of each answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cms_topology._retention._capture import undisturbed

CLASSES, LOG_PROBS = "answer_classes", "answer_log_probs"

OutputsFn = Callable[[nn.Module, Any], Tensor]


def default_outputs(model: nn.Module, batch: Any) -> Tensor:
    """The "logits" of `model(**batch)`."""
    logits: Tensor = model(**batch)["logits"]
    return logits


@torch.no_grad()
def with_answers(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    classes: int = 32,
    outputs_fn: OutputsFn = default_outputs,
    chunk: int = 64,
) -> dict[str, Tensor]:
    """The batch, and what the model answers at every position now, for `Rehearsal` to hold it to.

    A written sequence holds one draw from each of the model's distributions; learning it again
    teaches the draw. The distributions themselves teach nothing new, so that a model which has
    not changed has nothing to repair, and one which has is told all of it (Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network"; for rehearsal Buzzega et al. 2020, "Dark
    Experience for General Continual Learning").

    Args:
        model: at the end of the task.
        batch: arguments of the model by name, [P, ...] each, without labels.
        classes: k, most probable classes kept of each answer; all others count as one.
        outputs_fn: (model, batch) -> logits [P, ..., V]. Default: `model(**batch)["logits"]`.
        chunk: sequences of one pass.

    Returns:
        The batch with two more tensors, [P, ..., k]: the classes, in the smallest integer type
        that holds them, and their log-probabilities in float16.

    Raises:
        ValueError: `classes` or `chunk` below 1.
    """
    for name, value in (("classes", classes), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} (={value}) must be at least 1.")
    found: list[tuple[Tensor, Tensor]] = []
    count = len(next(iter(batch.values())))
    with undisturbed(model):
        for start in range(0, count, chunk):
            part = {name: tensor[start : start + chunk] for name, tensor in batch.items()}
            logits = outputs_fn(model, part)
            top = logits.float().log_softmax(-1).topk(min(classes, logits.shape[-1]), dim=-1)
            small = _smallest_integer(logits.shape[-1])
            found.append((top.indices.to(small), top.values.to(torch.float16)))
    indices, log_probs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return {**batch, CLASSES: indices, LOG_PROBS: log_probs}


def divergence_from_answers(
    model: nn.Module, batch: dict[str, Tensor], outputs_fn: OutputsFn = default_outputs
) -> Tensor:
    """Mean KL(then || now) in nats over all answers of a batch from `with_answers`, 0-d.

    Classes that were not kept count together as one, which bounds the divergence from below.
    """
    asked = {name: t for name, t in batch.items() if name not in (CLASSES, LOG_PROBS)}
    logits = outputs_fn(model, asked)
    if logits.dtype != torch.float64:
        logits = logits.float()
    then = batch[LOG_PROBS].to(logits.dtype)
    now = logits.log_softmax(-1).gather(-1, batch[CLASSES].long())
    inside = (then.exp() * (then - now)).sum(-1)
    # what float16 rounds away of certain answers must not look like another class
    p, q = ((1 - t.exp().sum(-1)).clamp(min=1e-4) for t in (then, now))
    return (inside + p * (p / q).log()).mean()


def _smallest_integer(classes: int) -> torch.dtype:
    if classes <= 256:
        return torch.uint8
    return torch.int16 if classes <= 32768 else torch.int32
