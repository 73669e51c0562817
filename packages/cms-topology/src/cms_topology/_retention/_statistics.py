"""Sums over a task's tokens, and the layer memories they become.

Legend: N tokens of a pass, n inputs, m outputs, R block rows, C block columns, B tile side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cms_topology import _distributed as dist_sync
from cms_topology._linear import CMSBlockLinear
from cms_topology._retention._consolidation import LayerMemory
from cms_topology._retention._covariance import Covariance


class LayerStatistics:
    """Sums over the tokens that reach one weight matrix. All in float64.

    Args:
        n: inputs.
        rows, tile_in, tile_out: the grid of the usage: `rows` block rows of `tile_out` outputs,
            and block columns of `tile_in` inputs.
        device: of the layer.
    """

    def __init__(
        self, n: int, rows: int, tile_in: int, tile_out: int, device: torch.device
    ) -> None:
        self.n, self.rows, self.tile_in, self.tile_out = n, rows, tile_in, tile_out
        f64: Any = {"dtype": torch.float64, "device": device}
        self.second_moment = torch.zeros(n, n, **f64)
        self.energy = torch.zeros((), **f64)
        self.weight = torch.zeros((), **f64)
        self.tokens = torch.zeros((), **f64)
        self.fisher = torch.zeros(rows, n // tile_in, **f64)
        self.error = torch.zeros(rows, **f64)

    @torch.no_grad()
    def add_inputs(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Count tokens x [N, n], each `weight` [N] times (default: once)."""
        wide = x.double()
        self.tokens += wide.shape[0]
        self.energy += wide.square().sum() / self.n
        if weight is None:
            self.weight += wide.shape[0]
            self.second_moment += wide.T @ wide
        else:
            self.weight += weight.double().sum()
            self.second_moment += (wide * weight.double()[:, None]).T @ wide

    @torch.no_grad()
    def add_errors(self, x: Tensor, delta: Tensor) -> None:
        """Count the per-token loss gradients delta [N, m] of outputs whose inputs are x [N, n]."""
        e = delta.double().square().view(-1, self.rows, self.tile_out).sum(2)
        a = x.double().square().view(-1, self.n // self.tile_in, self.tile_in).sum(2)
        self.fisher += e.T @ a
        self.error += e.sum(0) / self.tile_out

    @property
    def is_finite(self) -> bool:
        """Whether no NaN and no infinity was counted. Waits for the device."""
        return bool(torch.stack([t.sum() for t in self.sums()]).isfinite().all())

    def sums(self) -> list[Tensor]:
        """The tensors that add up over ranks."""
        return [
            self.second_moment, self.energy, self.weight, self.tokens, self.fisher, self.error,
        ]  # fmt: skip

    def memory(
        self, weight: float, live: Tensor | None, errors: bool, dtype: torch.dtype
    ) -> LayerMemory:
        """Means over the tokens, the covariance normalised and all but the energy times weight."""
        K = self.second_moment / self.weight.clamp(min=1e-300)
        mean = K.diagonal().mean()
        K = (K + K.T) / (2 * mean.clamp(min=1e-300)) * weight
        tokens = self.tokens.clamp(min=1)
        return LayerMemory(
            covariance=Covariance(K.to(dtype)),
            energy=(self.energy / tokens).to(torch.float32),
            usage=(self.fisher / tokens * weight).float() if errors else None,
            error=(self.error / tokens * weight).float() if errors else None,
            live=live,
        )


class TaskStatistics:
    """Statistics of every weight matrix and embedding that a task's passes touch.

    Args:
        names: name of every parameter of the model.
        sparse: the block-sparse layers by their `values`.
    """

    def __init__(self, names: dict[Tensor, str], sparse: dict[Tensor, CMSBlockLinear]) -> None:
        self.names, self.sparse = names, sparse
        self.parameters = {name: p for p, name in names.items()}
        self.layers: dict[str, LayerStatistics] = {}
        self.rows: dict[str, Tensor] = {}
        self.touched: set[str] = set()

    def use(self, parameter: Tensor) -> None:
        """Note that a pass used a parameter in whatever way."""
        if parameter in self.names:  # else it is one from elsewhere
            self.touched.add(self.names[parameter])

    def of(self, weight: Tensor) -> LayerStatistics:
        """The statistics of a weight matrix, made when first asked for."""
        name = self.names[weight]
        if name not in self.layers:
            layer = self.sparse.get(weight)
            grid = (
                (layer.in_features, layer.R, layer.B, layer.B)
                if layer is not None
                else (weight[0].numel(), weight.shape[0], weight[0].numel(), 1)
            )
            self.layers[name] = LayerStatistics(*grid, weight.device)
        return self.layers[name]

    def use_rows(self, weight: Tensor, indices: Tensor) -> None:
        """Note rows that were looked up."""
        name = self.names[weight]
        if name not in self.rows:
            self.rows[name] = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
        self.rows[name][indices.flatten()] = True

    def live(self, name: str) -> Tensor | None:
        """bool [R, C] of a block-sparse layer's present blocks."""
        layer = self.sparse.get(self.parameters[name])
        if layer is None:
            return None
        columns = layer.col_indices[:, : layer.num_live].long()
        mask = torch.zeros(layer.R, layer.C, dtype=torch.bool, device=columns.device)
        return mask.scatter_(1, columns, True)

    def check_finite(self, task: str) -> None:
        """Refuse statistics that would let every later projection come out as NaN.

        Raises:
            ValueError: NaN or infinity was met.
        """
        broken = [name for name, layer in self.layers.items() if not layer.is_finite]
        if broken:
            raise ValueError(
                f"batches of task {task!r} must give finite inputs and gradients: {len(broken)} of "
                f"{len(self.layers)} weight matrices met NaN or infinity, first {broken[0]!r}; "
                "leave out the batch that is not finite, or run the model in another precision."
            )

    def all_reduce(self) -> None:
        """Add up over the ranks of torch.distributed, if it is in use."""
        if dist_sync.world_size() == 1:
            return
        # a rank may have seen fewer layers or embeddings than another
        everyone: list[tuple[list[str], ...]] = [([], [], [])] * dist_sync.world_size()
        mine = (list(self.layers), list(self.rows), list(self.touched))
        dist.all_gather_object(everyone, mine)
        self.touched.update(name for *_, touched in everyone for name in touched)
        for name in sorted({name for layers, _, _ in everyone for name in layers}):
            for tensor in self.of(self.parameters[name]).sums():
                dist.all_reduce(tensor)
        for name in sorted({name for _, rows, _ in everyone for name in rows}):
            weight = self.parameters[name]
            self.use_rows(weight, torch.zeros(0, dtype=torch.int64, device=weight.device))
            counts = self.rows[name].int()
            dist.all_reduce(counts)
            self.rows[name] = counts > 0
