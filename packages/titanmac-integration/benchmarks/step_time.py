"""Time, tokens per second and memory of a training step, dense and block-sparse, beside the bound.

A step is forward, backward and AdamW (fused) in bfloat16 autocast, with the topology's work when
the blocks move. The bound is what Amdahl's law allows: the step's multiply-adds if those of absent
blocks were free. The host enqueues all steps (where blocks move, up to and with a decision) without
waiting for the device, as in a training, and the device's own clock is read between them.

    python benchmarks/step_time.py --presets titanmac-163m titanmac-237m --out out

One JSON line per cell goes to OUT/step_time.jsonl, cells that fail included.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from pathlib import Path
from statistics import quantiles

import torch
from graphed import WARM_UP, adamw, training_step

import titanmac_integration
from cms_topology import TopologyManager
from titanmac_integration import TitanMACConfig, create_titanmac_model

MIDDLE = (8, 9, 10, 11, 12)
TILES = ((128, 1), (64, 2), (32, 4), (16, 8))
"""Sides of the tiles, and rows of blocks that share their columns."""
PERIODS = (1, 10, 100)


def multiply_adds(config: TitanMACConfig) -> tuple[float, float]:
    """Per token in a forward pass: of a dense model, of the model without its absent blocks."""
    mlp = 2 * config.d_model * config.d_ff
    attention = 4 * config.d_model**2
    reach = config.window_size / 2 + config.n_persistent
    scores = 2 * reach * config.d_model
    head = config.d_model * config.vocab_size
    dense = config.n_layers * (mlp + attention + scores) + head
    saved = sum(
        mlp * (1 - config.density_of(layer))
        for layer in config.block_sparse_layer_indices()
        if "mlp" in config.block_sparse_components
    )
    return dense, dense - saved


def measure(config: TitanMACConfig, moving: bool, options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    model = create_titanmac_model(config, device="cuda")
    graph = options.graph
    optimizer = adamw([{"params": list(model.parameters())}], 1e-4, graph=graph)
    manager = TopologyManager(model, optimizer, periods=PERIODS) if moving else None
    for layer in model.block_sparse_layers.values():
        layer.collect_candidates = layer.collect_candidates and moving
    started = time.perf_counter()
    if options.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    shape = (options.batch_size, options.sequence)
    tokens = torch.randint(config.vocab_size, shape, device="cuda")
    settings = {"autocast": True, "clip": None, "graph": graph, "return_logits": options.logits}
    train = training_step(model, optimizer, **settings)

    def step() -> None:
        train(tokens, tokens)
        if manager is not None:
            manager.step()

    # the first decision loads its kernels, before the second its statistics are captured
    for _ in range(2 * PERIODS[-1] if moving else WARM_UP):
        step()
    torch.cuda.synchronize()
    compile_s = time.perf_counter() - started
    if not graph:  # a replay allocates nothing: a graph's peak is that of its capture
        torch.cuda.reset_peak_memory_stats()
    steps = PERIODS[-1] if moving else options.steps
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    overhead = manager.overhead_seconds if manager else 0.0
    whole = time.perf_counter()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    whole = time.perf_counter() - whole
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    cuts = quantiles(times, n=10)
    dense, sparse = multiply_adds(config)
    return {
        "p20_ms": round(cuts[1], 2),
        "p50_ms": round(cuts[4], 2),
        "p80_ms": round(cuts[7], 2),
        "mean_ms": round(sum(times) / len(times), 2),
        "tokens_per_s": round(tokens.numel() * steps / whole),
        "peak_mib": torch.cuda.max_memory_allocated() >> 20,
        "parameters": model.num_parameters,
        "bound": round(dense / sparse, 3),
        "topology_host_frac": round((manager.overhead_seconds - overhead) / whole, 4)
        if manager
        else None,
        "warm_up_s": round(compile_s, 1),
    }


def cells(options: argparse.Namespace) -> list[tuple[str, dict, bool]]:
    """Name, changes of the configuration, whether blocks move."""
    found: list[tuple[str, dict, bool]] = [("dense", {}, False)]
    for (tile, group), layers, density in itertools.product(TILES, (None, MIDDLE), (0.5, 0.25)):
        changes = {
            "use_block_sparse": True,
            "block_sparse_tile_size": tile,
            "block_sparse_row_group": group,
            "block_sparse_layers": layers,
            "block_sparse_density": density,
        }
        where = "all layers" if layers is None else "layers 8-12"
        name = f"{density:.0%} of {where}, tile {tile} x {group}"
        found.append((name, changes, False))
        if density == 0.5 and options.moving:
            found.append((name + ", moving", changes, True))
    if options.memory:
        found += [
            (variant, {"use_neural_memory": True, "titans_variant": variant}, False)
            for variant in ("MAC", "MAG", "MAL")
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["titanmac-163m", "titanmac-237m"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--compile", action="store_true", help="compile block by block")
    parser.add_argument("--graph", action="store_true", help="one CUDA graph per step")
    parser.add_argument("--logits", action="store_true", help="all logits at once")
    parser.add_argument("--moving", action="store_true", help="also cells whose blocks move")
    parser.add_argument("--memory", action="store_true", help="also the three variants")
    parser.add_argument("--only", nargs="+", default=[""], help="cells whose name contains one")
    parser.add_argument("--vocab-size", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for preset, (name, changes, moving) in itertools.product(options.presets, cells(options)):
        if not any(part in name for part in options.only):
            continue
        if options.vocab_size:
            changes = {**changes, "vocab_size": options.vocab_size}
        row = {
            "preset": preset,
            "cell": name,
            "vocab_size": options.vocab_size,
            "compiled": options.compile,
            "logits": options.logits,
            "graph": options.graph,
            "batch_size": options.batch_size,
            "sequence": options.sequence,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "version": titanmac_integration.__version__,
        }
        try:
            row.update(measure(TitanMACConfig.preset(preset, **changes), moving, options))
        except Exception as error:  # one bad cell shall not cost the others
            row["error"] = repr(error)[:300]
        gc.collect()
        torch.cuda.empty_cache()
        print(json.dumps(row), flush=True)
        with (options.out / "step_time.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
