"""Agreement between the ranks of torch.distributed; does nothing in a single process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from cms_topology._sampled import fold_sampled_steps

if TYPE_CHECKING:
    from cms_topology._linear import CMSBlockLinear


class TopologyDivergenceError(RuntimeError):
    """The ranks of a data-parallel run no longer hold the same topology."""


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def sync_topology_scores(layers: Sequence[CMSBlockLinear]) -> None:
    """Average scores and collected statistics over all ranks: one all-reduce for all layers.

    DDP averages gradients; what a rank collected about absent blocks from its own tokens, it does
    not.
    """
    fold_sampled_steps([layer.scorer for layer in layers])
    if world_size() == 1 or not layers:
        return
    parts = [p for layer in layers for p in (layer.scorer.score_ema, layer.scorer._means)]
    parts += [layer.scorer.loss.means for layer in layers if layer.scorer.loss is not None]
    flat = torch.cat([p.flatten() for p in parts])
    dist.all_reduce(flat)
    flat /= world_size()
    means = flat.split([p.numel() for p in parts])
    torch._foreach_copy_(parts, [m.view_as(p) for m, p in zip(means, parts, strict=True)])


def gather_checksums(
    checksums: Sequence[str], device: torch.device | None = None
) -> list[list[str]]:
    """This rank's hexadecimal digests -> for each of them, the digests of all ranks.

    Args:
        checksums: equally long hexadecimal strings, one per layer.
        device: where the collective runs; the process group's own kind.
    """
    if world_size() == 1 or not checksums:
        return [[checksum] for checksum in checksums]
    raw = torch.tensor([list(bytes.fromhex(c)) for c in checksums], dtype=torch.uint8)
    mine = raw.to(device) if device is not None else raw
    all_ranks = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(all_ranks, mine)
    hosts = [t.cpu().tolist() for t in all_ranks]
    return [[bytes(host[i]).hex() for host in hosts] for i in range(len(checksums))]


def raise_on_divergence(step: int, checksums: dict[str, list[str]]) -> None:
    """Compare every layer's digests over the ranks.

    Raises:
        TopologyDivergenceError: naming step, layer and the ranks that differ from rank 0.
    """
    for name, digests in checksums.items():
        odd = [r for r, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise TopologyDivergenceError(
                f"the topology of layer {name!r} differs between ranks after the decision at step "
                f"{step}: ranks {odd} disagree with rank 0. Build the model with the same seed on "
                "every rank, or load the same checkpoint, and give every TopologyManager the same "
                "seed."
            )
