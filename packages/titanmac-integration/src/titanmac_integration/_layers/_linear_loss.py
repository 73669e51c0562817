"""The training loss straight from the hidden states: logits exist for some rows at a time.

With a vocabulary of 128,000 the logits are the largest tensor of a training by far, and the plain
way keeps several copies of them in float32. Here a chunk of rows is multiplied out, its gradient
takes the place of its logits at once, and goes into the gradients of hidden states and head.

Legend: S batch, T tokens, N rows that predict, S (T - 1), D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titanmac_integration._labels import IGNORE_INDEX

from ._project import WIDE_PRODUCTS, wide_product
from ._triton import has_triton

CHUNK_BYTES = 2**30
"""Logits that exist at a time; smaller chunks cost passes over the gradient of the head."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss_weight: float,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Tensor]:
    """What ``language_model_loss`` gives for the logits ``hidden @ weight.T``, but for rounding.

    ``hidden`` [S, T, D], ``weight`` [V, D], ``labels`` int64 [S, T]. Gradients are computed in the
    forward pass, in the precision of autocast, and gathered in float32 at least; they cannot be
    differentiated again.
    """
    device = hidden.device.type
    rows = hidden[:, :-1].flatten(0, 1)
    if torch.is_autocast_enabled(device) and rows.dtype != torch.float64:
        rows = rows.to(torch.get_autocast_dtype(device))
    at_once = max(1, chunk_bytes // (rows.element_size() * len(weight)))
    loss, cross_entropy, z_loss = _LinearLoss.apply(
        rows, weight, labels[:, 1:].flatten(), z_loss_weight, at_once, torch.is_grad_enabled()
    )
    output = {"loss": loss, "cross_entropy": cross_entropy}
    if z_loss_weight != 0.0:
        output["z_loss"] = z_loss
    return output


def softmax_gradient_(logits: Tensor, targets: Tensor, z_weight: float, gradient: bool) -> Tensor:
    """Log-partitions of rows [N, V]; with ``gradient`` it takes the logits' place.

    It is that of the row's cross entropy plus ``z_weight`` times its squared log-partition, and
    zero where the target is ignored. Log-partitions are float32, or float64 for such logits.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_sums = wide.logsumexp(-1)
    if gradient:
        ignored = targets == IGNORE_INDEX
        probability = (wide - log_sums[:, None]).exp_()
        if z_weight != 0.0:
            probability *= 1.0 + 2.0 * z_weight * log_sums[:, None]
        index = targets.masked_fill(ignored, 0)[:, None]
        probability.scatter_add_(1, index, torch.full_like(log_sums, -1.0)[:, None])
        logits.copy_(probability.masked_fill_(ignored[:, None], 0.0))
    return log_sums


def _on_gpu(logits: Tensor) -> bool:
    """Whether the Triton kernel takes these logits."""
    return logits.is_cuda and logits.dtype != torch.float64 and has_triton()


def _added(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + left @ right`` in ``dtype``, in the memory of ``total`` where there is one."""
    half = left.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
    if left.is_cuda and half and WIDE_PRODUCTS:
        return wide_product(left, right, total)
    product = left @ right
    return product.to(dtype) if total is None else total.add_(product)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_weight: float,
        at_once: int,
        gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, dtype = len(rows), rows.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        head = weight.to(dtype)
        gradient = gradient and any(ctx.needs_input_grad[:2])
        log_sums = rows.new_empty(count, dtype=wide)
        at_target = rows.new_empty(count, dtype=wide)
        grad_rows = torch.empty_like(rows) if gradient else None
        grad_weight: Tensor | None = None
        buffer = rows.new_empty(min(at_once, count), len(weight))
        if _on_gpu(buffer):
            from ._loss_kernels import softmax_gradient_ as turn
        else:
            turn = softmax_gradient_
        ignored = targets == IGNORE_INDEX
        index = targets.masked_fill(ignored, 0)
        for first in range(0, count, at_once):
            part = slice(first, min(first + at_once, count))
            logits = torch.mm(rows[part], head.t(), out=buffer[: part.stop - first])
            at_target[part] = logits.gather(1, index[part, None])[:, 0]
            log_sums[part] = turn(logits, targets[part], z_weight, gradient)
            if grad_rows is not None:
                torch.mm(logits, head, out=grad_rows[part])
                grad_weight = _added(grad_weight, logits.t(), rows[part], wide)
        if gradient and grad_weight is None:  # no rows
            grad_weight = torch.zeros_like(weight, dtype=wide)
        counted = (~ignored).sum()
        cross_entropy = (log_sums - at_target).masked_fill(ignored, 0.0).sum() / counted
        z_loss = log_sums.square().masked_fill(ignored, 0.0).sum() / counted
        loss = cross_entropy + z_weight * z_loss if z_weight != 0.0 else cross_entropy.clone()
        ctx.mark_non_differentiable(cross_entropy, z_loss)
        ctx.save_for_backward(grad_rows, grad_weight, counted)
        ctx.dtype = weight.dtype
        return loss, cross_entropy, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_weight, counted = ctx.saved_tensors
        share = grad / counted
        # the share is not rounded to half precision: that would scale every gradient wrongly
        rows = (grad_rows.to(share.dtype) * share).to(grad_rows.dtype)
        # one pass of vectorised loads, which a product with a 0-d tensor is not
        weight = torch._foreach_mul([grad_weight], share)[0].to(ctx.dtype)
        return rows, weight, None, None, None, None
