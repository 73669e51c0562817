"""The first snapshot of a run."""

import torch

from blockell_format.snapshots import SnapshotWriter
from cms_topology import TopologyManager

from ._training_processes import gather_bytes


def write_first_snapshot(
    manager: TopologyManager | None, writer: SnapshotWriter | None, device: torch.device
) -> None:
    """Record the topology before the first step, with every process's checksums."""
    if manager is None:
        return
    mine = [layer.topology_checksum() for layer in manager.layers.values()]
    every = [data.decode().split() for data in gather_bytes(" ".join(mine).encode(), device)]
    if writer is None:
        return
    per_layer = zip(*every, strict=True)
    writer.write(
        manager.global_step,
        manager.snapshot(),
        checksums={n: list(s) for n, s in zip(manager.layers, per_layer, strict=True)},
        swap_counts=dict.fromkeys(manager.layers, 0),
    )
