"""Train a small block-sparse TitanMAC in a plain PyTorch loop.

    python train_block_sparse.py --steps 200 --out runs/example

The three lines that make the topology move are marked; everything else is an ordinary loop.
"""

import argparse

import torch

from blockell_format.snapshots import SnapshotWriter
from cms_topology import TopologyManager
from titanmac_integration import ProseTask, TitanMACConfig, create_titanmac_model

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default="runs/example", help="run directory for the dashboard")
arguments = parser.parse_args()

config = TitanMACConfig(
    d_model=64,
    n_heads=4,
    n_layers=2,
    d_ff=256,
    max_seq_len=64,
    window_size=32,
    n_persistent=2,
    use_block_sparse=True,
    block_sparse_density=0.5,
    block_sparse_layers=None,  # all
    block_sparse_row_group=1,  # every block row chooses its own columns
)
model = create_titanmac_model(config, seed=0)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
manager = TopologyManager(model, optimizer, periods=(1, 5, 20), seed=0)  # 1

task = ProseTask()
data = torch.Generator().manual_seed(0)
with SnapshotWriter(arguments.out, layers=manager.layer_table()) as writer:
    manager.writer = manager.logger = writer  # 2: record every decision
    manager.write_snapshot()
    for step in range(1, arguments.steps + 1):
        batch = task.batch(batch_size=16, seq_len=64, generator=data)
        loss = model(batch.input_ids, batch.labels)["loss"]
        loss.backward()
        optimizer.step()
        report = manager.step()  # 3: between optimizer.step() and zero_grad()
        optimizer.zero_grad()
        writer.log({"train/loss": loss.item()}, step)
        if report.swap_rate is not None or step == arguments.steps:
            swaps = f"{report.swap_rate:.1%}" if report.swap_rate is not None else "-"
            print(f"step {step}: loss {loss.item():.3f}, swap rate {swaps}")

for name, layer in model.block_sparse_layers.items():
    stats = layer.get_topology_stats()
    print(f"{name}: density {stats.density:.2f}, column entropy {stats.column_entropy:.3f}")
print(f"{task.evaluate(model):.2f} bits per byte; look at it: blockell-dashboard {arguments.out}")
