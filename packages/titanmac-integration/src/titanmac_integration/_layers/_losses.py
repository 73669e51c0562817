"""The training loss and its parts."""

import torch
from torch import Tensor
from torch.nn import functional

from titanmac_integration._labels import IGNORE_INDEX


def language_model_loss(logits: Tensor, labels: Tensor, z_loss_weight: float) -> dict[str, Tensor]:
    """``loss`` and its parts, each a scalar; ``logits`` [S, T, V], ``labels`` [S, T].

    The loss is the mean cross entropy in nats of the positions that count, plus, if it has a
    weight, the mean squared log-partition (Chowdhery et al. 2022, "PaLM", section 5).
    """
    predictions = logits[:, :-1].flatten(0, 1).float()
    targets = labels[:, 1:].flatten()
    cross_entropy = functional.cross_entropy(predictions, targets, ignore_index=IGNORE_INDEX)
    if z_loss_weight == 0.0:
        return {"loss": cross_entropy, "cross_entropy": cross_entropy.detach()}
    counted = targets != IGNORE_INDEX
    squares = predictions.logsumexp(-1).square()
    z_loss = torch.where(counted, squares, 0.0).sum() / counted.sum()
    return {
        "loss": cross_entropy + z_loss_weight * z_loss,
        "cross_entropy": cross_entropy.detach(),
        "z_loss": z_loss.detach(),
    }
