"""Sums over a task's tokens, and the layer memories they become.

Legend: N tokens of a pass, n inputs, m outputs, R block rows, C block columns, B tile side; G
groups of outputs that read inputs of their own, g consecutive ones of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cms_topology import _distributed as dist_sync
from cms_topology._linear import CMSBlockLinear
from cms_topology._retention._consolidation import LayerMemory
from cms_topology._retention._covariance import Covariance, in_groups
from cms_topology._retention._layout import PLAIN, Layout
from cms_topology._retention._product import Product


class LayerStatistics:
    """Sums over the tokens that reach one weight matrix. All in float64.

    Args:
        n: inputs, of each group.
        rows, tile_in, tile_out: the grid of the usage: `rows` block rows of `tile_out` outputs,
            and block columns of `tile_in` inputs.
        device: of the layer.
        layout: of the parameter.
    """

    def __init__(
        self,
        n: int,
        rows: int,
        tile_in: int,
        tile_out: int,
        device: torch.device,
        layout: Layout = PLAIN,
    ) -> None:
        self.n, self.rows, self.tile_in, self.tile_out = n, rows, tile_in, tile_out
        self.layout = layout
        f64: Any = {"dtype": torch.float64, "device": device}
        self.second_moment = torch.zeros(layout.groups, n, n, **f64)
        # [G] each
        self.energy, self.weight, self.tokens = torch.zeros(3, layout.groups, **f64)
        self.fisher = torch.zeros(rows, n // tile_in, **f64)
        self.error = torch.zeros(rows, **f64)

    @torch.no_grad()
    def add_inputs(self, x: Tensor, of: slice = slice(None), delta: Tensor | None = None) -> None:
        """Count tokens x, [N, n] or [N, g, n], in the groups `of`.

        Each as often as the squares of its outputs' sensitivities delta [N, g m] add up to
        (default: once).
        """
        wide = x.double()[None] if x.ndim == 2 else x.double().transpose(0, 1)
        self.tokens[of] += wide.shape[1]
        self.energy[of] += wide.square().sum((1, 2)) / self.n
        if delta is None:
            self.weight[of] += wide.shape[1]
            self.second_moment[of] += wide.mT @ wide
        else:
            groups = len(self.tokens[of])
            times = delta.double().square().view(len(delta), groups, -1).sum(2).T
            self.weight[of] += times.sum(1)
            self.second_moment[of] += (wide * times[:, :, None]).mT @ wide

    @torch.no_grad()
    def add_errors(self, x: Tensor, delta: Tensor, of: slice = slice(None)) -> None:
        """Count the per-token loss gradients delta [N, g m] of outputs whose inputs are x."""
        e = delta.double().square().view(len(delta), -1, self.tile_out).sum(2)
        a = x.double().square().unflatten(-1, (-1, self.tile_in)).sum(-1)
        each = self.rows // self.layout.groups
        first = of.indices(self.layout.groups)[0] * each
        rows = slice(first, first + e.shape[1])
        if x.ndim == 2:
            self.fisher[rows] += e.T @ a
        else:
            self.fisher[rows] += (e.unflatten(1, (-1, each)) * a).sum(0).reshape(-1, 1)
        self.error[rows] += e.sum(0) / self.tile_out

    def refine(self, groups: int) -> None:
        """Keep the statistics of so many groups, a multiple of those there are."""
        self.layout = self.layout._replace(groups=groups)
        self.second_moment = in_groups(self.second_moment, groups)
        for name in ("energy", "weight", "tokens"):
            each = getattr(self, name)
            setattr(self, name, each.repeat_interleave(groups // len(each)))

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
        K = self.second_moment / self.weight.clamp(min=1e-300)[:, None, None]
        mean = K.diagonal(dim1=1, dim2=2).mean()
        K = (K + K.mT) / (2 * mean.clamp(min=1e-300)) * weight
        tokens = self.tokens.clamp(min=1)
        per_row = tokens.repeat_interleave(self.rows // self.layout.groups)
        return LayerMemory(
            covariance=Covariance((K if len(K) > 1 else K[0]).to(dtype)),
            energy=(self.energy / tokens).mean().to(torch.float32),
            usage=(self.fisher / per_row[:, None] * weight).float() if errors else None,
            error=(self.error / per_row * weight).float() if errors else None,
            live=live,
            inputs_first=self.layout.inputs_first,
            stacked=self.layout.stacked,
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
        self.elsewhere: set[Tensor] = set()
        """Parameters that the loss depends on, but are not the model's."""
        self.others: dict[str, str] = {}
        """Parameters that act where no product is seen, by which function."""

    def use(self, parameter: Tensor) -> None:
        """Note that a pass used a parameter in whatever way."""
        if parameter in self.names:
            self.touched.add(self.names[parameter])

    def use_leaf(self, leaf: Tensor) -> None:
        """Note a leaf of the loss's graph, a parameter of the model or another."""
        self.use(leaf)
        if isinstance(leaf, nn.Parameter) and leaf not in self.names:
            self.elsewhere.add(leaf)

    def use_otherwise(self, others: Mapping[Tensor, str]) -> None:
        """Note what else than products used parameters."""
        for parameter, function in others.items():
            if parameter in self.names:
                self.others.setdefault(self.names[parameter], function)

    def of(self, product: Product) -> tuple[LayerStatistics, slice]:
        """The statistics of a weight matrix, made when first asked for, and which groups of them
        a product computes."""
        weight, layout = product.weight, product.layout
        layer = self._of(weight, layout)
        if product.span is None:
            return layer, slice(None)
        if layer.layout.groups % layout.groups:
            layer.refine(math.lcm(layer.layout.groups, layout.groups))
        each = layer.layout.groups // layout.groups
        return layer, slice(product.first * each, (product.first + product.span) * each)

    def _of(self, weight: Tensor, layout: Layout) -> LayerStatistics:
        name = self.names[weight]
        found = self.layers.get(name)
        if found is not None and found.layout.alike(layout):
            return found
        layer = self.sparse.get(weight)
        if layer is not None:
            grid = (layer.in_features, layer.R, layer.B, layer.B)
        else:
            G, m, n = layout.shape(weight.shape)
            grid = (n, G * m, n, 1)
        new = LayerStatistics(*grid, weight.device, layout)
        if found is not None:  # one projection cannot serve both, so none of them counts
            self.others.setdefault(name, "its transpose")
            return new
        return self.layers.setdefault(name, new)

    def use_rows(self, weight: Tensor, indices: Tensor) -> None:
        """Note rows that were looked up."""
        if weight not in self.names:  # a parameter from elsewhere
            return
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
        everyone: list[Any] = [None] * dist_sync.world_size()
        layouts = {name: layer.layout for name, layer in self.layers.items()}
        dist.all_gather_object(
            everyone, (layouts, list(self.rows), list(self.touched), self.others)
        )
        for theirs, _, touched, others in everyone:
            self.touched.update(touched)
            self.others = {**others, **self.others}
            for name, layout in theirs.items():
                layer = self._of(self.parameters[name], layout)
                if layer.layout.groups % layout.groups:
                    layer.refine(math.lcm(layer.layout.groups, layout.groups))
        for name in sorted(self.layers):
            for tensor in self.layers[name].sums():
                dist.all_reduce(tensor)
        for name in sorted({name for _, rows, *_ in everyone for name in rows}):
            weight = self.parameters[name]
            self.use_rows(weight, torch.zeros(0, dtype=torch.int64, device=weight.device))
            counts = self.rows[name].int()
            dist.all_reduce(counts)
            self.rows[name] = counts > 0
