"""Agreement between the ranks of torch.distributed; does nothing in a single process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cms_topology._sampled import fold_sampled_steps

if TYPE_CHECKING:
    from cms_topology._linear import CMSBlockLinear


class TopologyDivergenceError(RuntimeError):
    """The ranks of a data-parallel run no longer hold the same topology."""


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks of a group, by default of all; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in a group, by default of all; 0 without torch.distributed."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def sync_topology_scores(
    layers: Sequence[CMSBlockLinear], group: dist.ProcessGroup | None = None
) -> None:
    """Average scores and collected statistics over all ranks: one all-reduce for all layers.

    DDP averages gradients; what a rank collected about absent blocks from its own tokens, it does
    not.

    Args:
        layers: the same ones on every rank.
        group: the ranks that train them; default: all.
    """
    fold_sampled_steps([layer.scorer for layer in layers])
    ranks = world_size(group)
    if ranks == 1 or not layers:
        return
    parts = [p for layer in layers for p in (layer.scorer.score_ema, layer.scorer._means)]
    parts += [layer.scorer.loss.means for layer in layers if layer.scorer.loss is not None]
    device = parts[0].device  # a model may be on several
    flat = torch.cat([p.flatten().to(device) for p in parts])
    dist.all_reduce(flat, group=group)
    flat /= ranks
    means = flat.split([p.numel() for p in parts])
    torch._foreach_copy_(parts, [m.view_as(p) for m, p in zip(means, parts, strict=True)])


def scores_differ(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[int]:
    """Positions of scores that were not this rank's own before they were averaged, by over 1%.

    Where gradients are averaged the scores of present blocks agree to the bit, or, on devices of
    different kinds, to rounding. Waits for the device.
    """
    apart = [
        (own - mean).norm() > 0.01 * mean.norm() for own, mean in zip(before, after, strict=True)
    ]
    together = [flag.to(apart[0].device) for flag in apart]
    return torch.stack(together).nonzero().flatten().tolist() if apart else []


def on_any_rank(
    flags: Sequence[bool], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[bool]:
    """For every flag, whether some rank has set it."""
    if world_size(group) == 1 or not flags:
        return list(flags)
    seen = torch.tensor(flags, dtype=torch.uint8).to(device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in seen.tolist()]


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that DistributedDataParallel, if `model` is one, averages over; None: all."""
    group = getattr(model, "process_group", None)
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        return None
    return None if group is dist.group.WORLD else group


def refuse_join(model: nn.Module | None) -> None:
    """A rank that ran out of inputs takes part in DDP's collectives under Join, not in ours.

    Raises:
        ValueError: `model` is inside such a context.
    """
    config = getattr(model, "_join_config", None)
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise ValueError(
            f"model (={type(model).__name__}) must not be inside Join when a decision is due: the "
            "others would wait for ranks that ran out of inputs. Give all ranks as many steps, as "
            "a DistributedSampler does, or pass throw_on_early_termination=True."
        )


def gather_checksums(
    checksums: Sequence[str],
    device: torch.device | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[list[str]]:
    """This rank's hexadecimal digests -> for each of them, the digests of all ranks.

    Args:
        checksums: equally long hexadecimal strings, one per layer.
        device: where the collective runs; the process group's own kind.
        group: the ranks; default: all.
    """
    if world_size(group) == 1 or not checksums:
        return [[checksum] for checksum in checksums]
    raw = torch.tensor([list(bytes.fromhex(c)) for c in checksums], dtype=torch.uint8)
    mine = raw.to(device) if device is not None else raw
    all_ranks = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(all_ranks, mine, group=group)
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
