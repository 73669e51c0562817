"""Language modelling: TitanMAC `small` against a plain GPT, sparse against dense, moving blocks
against fixed ones.

Every model sees the same bytes in the same order, with the same optimizer, schedule and number of
steps; `--lrs` and `--dropouts` are tried for each alike. The GPT is torch's own
nn.TransformerEncoder with learned positions and full causal attention, `rotary` the same with
rotary positions; their MLPs are as wide as it takes to have as many parameters as `small`, or, as
`gpt:none`, as it has without memory.

    python benchmarks/lm_sanity.py --texts prose shakespeare.txt --out out

One JSON line per run goes to OUT/lm.jsonl. A text is split by position: the last tenth validates.
With `--tuning` that tenth is not looked at: the one before it validates, the first eight train.
The text `stdlib` is the source of the running Python's standard library, some 10 MB.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from pathlib import Path

import torch
from graphed import adamw, set_rate, training_step
from texts import load_text
from torch import nn
from torch.nn import functional

from cms_topology import TopologyManager, sparse_layers
from titanmac_integration import TitanMACConfig, create_titanmac_model

SEQUENCE, WEIGHT_DECAY = 512, 0.1
MODELS = ["gpt", "none", "MAC", "MAG", "MAL"]


@dataclasses.dataclass(frozen=True)
class Cell:
    model: str
    text: str
    lr: float
    seed: int
    dropout: float = 0.1


class RotaryLayer(nn.TransformerEncoderLayer):
    """A layer that turns queries and keys by their positions (Su et al. 2021)."""

    def forward(self, src: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        x = src + self.dropout1(self.attend(self.norm1(src)))
        return x + self._ff_block(self.norm2(x))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        own = self.self_attn
        qkv = functional.linear(x, own.in_proj_weight, own.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, own.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropped = own.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(
            turned(q), turned(k), v, dropout_p=dropped, is_causal=True
        )
        return own.out_proj(seen.transpose(1, 2).flatten(2))


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of [batch, heads, tokens, width]; halves are turned together."""
    half = x.shape[-1] // 2
    rates = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    one, other = x.float().split(half, dim=-1)
    return torch.cat((one * cos - other * sin, one * sin + other * cos), dim=-1).to(x.dtype)


class GPT(nn.Module):
    """A plain GPT of torch's own parts, tied head."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_layers: int,
        d_ff: int,
        dropout: float,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, d_model)
        self.positions = None if rotary else nn.Embedding(SEQUENCE, d_model)
        layer = (RotaryLayer if rotary else nn.TransformerEncoderLayer)(
            d_model, n_heads, d_ff, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, n_layers, nn.LayerNorm(d_model), enable_nested_tensor=False
        )
        self.dropout = nn.Dropout(dropout)
        for name, parameter in self.named_parameters():
            # each layer its own draw (the encoder copies the first one), GPT-2's spread
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
                if name.endswith(("linear2.weight", "out_proj.weight")):
                    parameter.data /= math.sqrt(2 * n_layers)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(length, device=tokens.device))
        x = self.layers(self.dropout(x), mask=mask, is_causal=True)
        logits = functional.linear(x, self.embedding.weight)
        predictions = logits[:, :-1].flatten(0, 1).float()
        return {"loss": functional.cross_entropy(predictions, labels[:, 1:].flatten())}


def titan(variant: str, **changes: object) -> TitanMACConfig:
    memory = {"use_neural_memory": False} if variant == "none" else {"titans_variant": variant}
    return TitanMACConfig.preset("small", **{**memory, **changes})


def make_model(name: str, seed: int, device: str, dropout: float) -> tuple[nn.Module, bool]:
    """The model, and whether its blocks move.

    Names: gpt or rotary, alone or with :variant, a variant, or
    variant:density:tile:group:(static|dynamic).
    """
    kind, _, size = name.partition(":")
    if kind in ("gpt", "rotary"):
        like = create_titanmac_model(titan(size or "MAG"), device="meta")
        shape, rotary = like.config, kind == "rotary"
        smallest = GPT(shape.d_model, shape.n_heads, shape.n_layers, 16, dropout, rotary)
        fixed = sum(p.numel() for p in smallest.parameters())
        per_unit = shape.n_layers * (2 * shape.d_model + 1)
        width = 16 + 8 * round((like.num_parameters - fixed) / per_unit / 8)
        torch.manual_seed(seed)
        model = GPT(shape.d_model, shape.n_heads, shape.n_layers, width, dropout, rotary)
        return model.to(device), False
    variant, *sparse = name.split(":")
    changes: dict[str, object] = {"dropout": dropout}
    if sparse:
        density, tile, group, _ = sparse
        changes |= {
            "use_block_sparse": True,
            "block_sparse_density": float(density),
            "block_sparse_tile_size": int(tile),
            "block_sparse_row_group": "auto" if group == "auto" else int(group),
            "block_sparse_layers": None,
        }
    model = create_titanmac_model(titan(variant, **changes), seed=seed, device=device)
    torch.manual_seed(seed)
    return model, bool(sparse) and sparse[3] == "dynamic"


def windows(data: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(data) - SEQUENCE, (size,), generator=generator)
    return data[(starts[:, None] + torch.arange(SEQUENCE)).to(data.device)].long()


def run_cell(cell: Cell, options: argparse.Namespace, out: Path) -> dict:
    device = options.device
    data = torch.frombuffer(bytearray(load_text(cell.text)), dtype=torch.uint8)
    tenths = [len(data) * tenth // 10 for tenth in ((8, 9) if options.tuning else (9, 10))]
    train_data, held_out = data[: tenths[0]].to(device), data[tenths[0] : tenths[1]].to(device)
    steps = options.steps[options.texts.index(cell.text) % len(options.steps)]
    model, dynamic = make_model(cell.model, cell.seed, device, cell.dropout)
    if options.compile:
        # block by block: layers of one shape share the compiled code
        blocks = model.layers.layers if isinstance(model, GPT) else model.blocks
        for block in blocks:
            block.compile(dynamic=False)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = adamw(groups, cell.lr, graph=options.graph, betas=(0.9, 0.95))
    manager = None
    if dynamic:
        for layer in sparse_layers(model).values():
            layer.scorer.config = dataclasses.replace(layer.scorer.config, **options.scoring)
        until = int(options.decide_until * steps)
        manager = TopologyManager(
            model, optimizer, periods=(1, 10, 50), seed=cell.seed, freeze_after=until
        )
    for module in model.modules():
        if hasattr(module, "collect_candidates") and manager is None:
            module.collect_candidates = False
    generator = torch.Generator().manual_seed(cell.seed)
    one_step = training_step(model, optimizer, autocast=True, graph=options.graph)
    curve, swaps, losses = [], [], []
    torch.cuda.reset_peak_memory_stats() if device != "cpu" else None
    started, evaluating = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        rate = min(1.0, step / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        set_rate(optimizer, cell.lr * rate)
        tokens = windows(train_data, options.batch_size, generator)
        loss = one_step(tokens, tokens)
        losses.append(loss.clone())
        if manager is not None:
            report = manager.step()
            if report.swap_rate is not None:
                swaps.append(round(report.swap_rate, 4))
        if step % options.every == 0 or step == steps:
            before = time.perf_counter()
            curve.append((step, round(evaluate(model, held_out, options), 4)))
            evaluating += time.perf_counter() - before
            print(cell, curve[-1], f"train {loss.item():.3f}", flush=True)
    result = {
        **dataclasses.asdict(cell),
        "text": Path(cell.text).stem,
        "steps": steps,
        "scoring": options.scoring if dynamic else None,
        "decide_until": options.decide_until if dynamic else None,
        "compiled": options.compile,
        "batch_size": options.batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": curve[-1][1],
        "best_validation": min(value for _, value in curve),
        "train": round(torch.stack(losses[-20:]).mean().item(), 4),
        "train_evaluated": round(evaluate(model, train_data, options), 4),
        "tuning": options.tuning,
        "bytes": len(data),
        "curve": curve,
        "swap_rates": swaps,
        "seconds": round(time.perf_counter() - started - evaluating, 1),
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if device != "cpu" else None,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
    }
    with (out / "lm.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    return result


@torch.no_grad()
def evaluate(model: nn.Module, held_out: torch.Tensor, options: argparse.Namespace) -> float:
    """Mean loss of evenly spaced windows, nats per byte."""
    model.eval()
    starts = torch.linspace(0, len(held_out) - SEQUENCE, options.eval_windows).long()
    rows = held_out[(starts[:, None] + torch.arange(SEQUENCE)).to(held_out.device)].long()
    total = 0.0
    for part in rows.split(options.batch_size):
        with torch.autocast(rows.device.type, dtype=torch.bfloat16):
            total += model(part, part)["loss"].item() * len(part)
    model.train()
    return total / len(rows)


def run_in_turn(cells: list[Cell], options: argparse.Namespace) -> None:
    """All settings for the first seed; with `--tune` only the best for the other seeds."""
    best: dict[tuple[str, str], tuple[float, tuple[float, float]]] = {}
    for cell in cells:
        key = (cell.model, cell.text)
        tried = (cell.lr, cell.dropout)
        chosen = best.get(key, (0.0, None))[1]
        if options.tune and cell.seed != options.seeds[0] and chosen != tried:
            continue
        try:
            result = run_cell(cell, options, options.out)
        except Exception as error:  # one bad cell shall not cost the others
            print("FAILED", cell, repr(error)[:500], flush=True)
            continue
        if cell.seed == options.seeds[0]:
            found = (result["best_validation"], tried)
            best[key] = min(best.get(key, (math.inf, tried)), found)


def work(queue: torch.multiprocessing.Queue, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    while not queue.empty():
        try:
            cell = queue.get(timeout=1)
        except Exception:
            return
        try:
            run_cell(cell, options, options.out)
        except Exception as error:  # one bad cell shall not cost the others
            print("FAILED", cell, repr(error)[:500], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--texts", nargs="+", default=["prose"])
    parser.add_argument("--steps", nargs="+", type=int, default=[400], help="per text")
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--eval-windows", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="compile block by block")
    parser.add_argument("--graph", action="store_true", help="one CUDA graph per step")
    parser.add_argument("--tune", action="store_true", help="best of the first seed only")
    parser.add_argument("--tuning", action="store_true", help="validate on the ninth tenth")
    parser.add_argument("--scoring", type=json.loads, default={}, help="fields of ScoringConfig")
    parser.add_argument("--decide-until", type=float, default=1.0, help="share of the steps")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cells = [
        Cell(model, text, lr, seed, dropout)
        for seed, dropout, lr, text, model in itertools.product(
            options.seeds, options.dropouts, options.lrs, options.texts, options.models
        )
    ]
    if options.jobs == 1:
        run_in_turn(cells, options)
        return
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    for cell in cells:
        queue.put(cell)
    workers = [context.Process(target=work, args=(queue, options)) for _ in range(options.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
