"""CMSBlockLinear: a linear layer whose blocks come and go.

Legend: R block rows, C block columns, K slots per row (live ones first, then spare), B tile side,
N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

import blockell_format as fmt
from blockell_format import num_blocks_for_density
from blockell_kernels import block_ell_linear, probe_size, transforms_active
from cms_topology import _distributed as dist_sync
from cms_topology._accumulate import accumulate_scores, refuse_replica, refuse_shards
from cms_topology._birth import reset_optimizer_state
from cms_topology._config import ScoringConfig
from cms_topology._decision import decide, refresh_derived
from cms_topology._growth import grow
from cms_topology._loading import after_load, before_load, check_own_columns
from cms_topology._loss_score import tap_fisher
from cms_topology._nested import on_nested
from cms_topology._result import AgeHistogram, TopologyDecisionResult, TopologyStats
from cms_topology._scorer import TopologyScorer, compute_column_entropy
from cms_topology._seeding import decision_generator
from cms_topology._shapes import TILE_SIZES, check_divisible, resolve_row_group
from cms_topology._swap_retention import LiveBlocks, SwapRetention


class CMSBlockLinear(nn.Module):
    """Drop-in `nn.Linear` with a block-sparse weight whose topology changes while it trains.

    The weight is stored in Block-ELL form: `values` [R, K, B, B] and `col_indices` int32 [R, K].
    Blocks are scored at every optimizer step and swapped at the slow level of a continuum memory
    system. `TopologyManager` runs that clock; without it call, after each optimizer step,
    `accumulate_scores()`, now and then `score_step()`, and rarely `topology_step()`.

    Args:
        in_features: size of the last dimension of the input; a multiple of `tile_size`.
        out_features: size of the last dimension of the output; a multiple of `tile_size`.
        bias: learn an additive bias.
        tile_size: side B of the square blocks: 8, 16, 32, 64 or 128.
        density: share of blocks present, in (0, 1]; the actual one is `self.density`.
        max_density: share of blocks there is storage for; above `density` it is spare capacity for
            `grow`. Default: `density`.
        row_group: rows of blocks that share their columns; a divisor of R. "auto" takes the
            largest with row_group * tile_size <= 128, which is what makes small tiles fast; 1 lets
            every row choose freely.
        scoring: how blocks are scored and swapped.
        seed: seed of the decisions made without a `TopologyManager` or generator.
        backend: see `blockell_kernels.block_ell_linear`.
        generator: source of the initial topology and weights. Default: torch's global generator,
            as for `nn.Linear`.
        device, dtype: of the parameters.

    Shapes: input [..., in_features], output [..., out_features].

    Raises:
        ValueError: sizes that the tile does not divide, a density outside its range, an unknown
            tile size, a row group that does not divide R.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    col_indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        tile_size: int = 16,
        density: float = 0.5,
        max_density: float | None = None,
        row_group: int | str = "auto",
        scoring: ScoringConfig | None = None,
        seed: int = 0,
        backend: str | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if tile_size not in TILE_SIZES:
            raise ValueError(f"tile_size (={tile_size}) must be one of {TILE_SIZES}.")
        check_divisible("in_features", in_features, tile_size)
        check_divisible("out_features", out_features, tile_size)
        if max_density is None:
            max_density = density
        if max_density < density:
            raise ValueError(f"max_density (={max_density}) must be at least density (={density}).")
        self.in_features, self.out_features = in_features, out_features
        self.R, self.C, self.B = out_features // tile_size, in_features // tile_size, tile_size
        self.num_live = num_blocks_for_density(self.C, density)
        self.K = num_blocks_for_density(self.C, max_density)
        self.row_group = resolve_row_group(row_group, self.R, tile_size)
        self.seed = seed
        self.backend = backend
        self.collect_candidates = False
        """Collect statistics of absent blocks in the backward pass. They cost about one more
        weight-gradient product: `TopologyManager` turns them on only just before a decision, and
        without one the first `accumulate_scores()` does, for the passes that follow."""

        self._clock: object | None = None
        """What counts the layer's steps: a token of the last manager that did."""

        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty(self.R, self.K, self.B, self.B, **kwargs))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **kwargs))
        else:
            self.register_parameter("bias", None)
        indices = torch.full((self.R, self.K), -1, dtype=torch.int32, device=device)
        self.register_buffer("col_indices", indices)
        self.scorer = TopologyScorer(self.R, self.C, self.K, self.B, scoring, device)
        self._make_derived()
        self.reset_parameters(generator)
        self.register_load_state_dict_pre_hook(before_load)
        self.register_load_state_dict_post_hook(after_load)

    # -- construction -------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw a random topology and weights with the output variance of a fresh `nn.Linear`."""
        self.scorer.initialize_scores()
        live = fmt.create_random_topology(
            self.R, self.C, self.num_live, generator, self.row_group, self.col_indices.device
        )
        self.col_indices.fill_(-1)[:, : self.num_live] = live
        # fan-in of a row is what reaches it, not in_features
        bound = 1.0 / math.sqrt(self.num_live * self.B)
        self.values.zero_()
        self.values[:, : self.num_live].uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound, generator=generator)
        self._refresh_derived()

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        tile_size: int = 16,
        density: float = 0.5,
        max_density: float | None = None,
        row_group: int | str = "auto",
        **kwargs: Any,
    ) -> CMSBlockLinear:
        """A sparse layer that keeps, in every row (group), the blocks of largest Frobenius norm.

        Takes device, dtype, training mode and `requires_grad` of `linear`; further arguments as in
        the constructor.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            tile_size=tile_size,
            density=density,
            max_density=max_density,
            row_group=row_group,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            **kwargs,
        )
        kept = fmt.from_dense(
            linear.weight.detach(), layer.B, layer.num_live / layer.C, layer.row_group
        )
        layer.values[:, : layer.num_live] = kept.values
        layer.col_indices[:, : layer.num_live] = kept.col_indices
        layer.values.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.copy_(linear.bias).requires_grad_(linear.bias.requires_grad)
        layer._refresh_derived()
        return layer.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A dense `nn.Linear`: same function, device, dtype, training mode, `requires_grad`."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        linear.weight.copy_(self.to_dense()).requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            linear.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    # -- the layer ----------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b: [..., in_features] -> [..., out_features].

        Raises:
            ValueError: the last dimension is not in_features, or `x` is nested but not jagged.
        """
        if x.is_nested:
            return on_nested(self.forward, x)
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"the last dimension of x (={x.shape[-1] if x.ndim else 'none, a scalar'}) must be "
                f"in_features (={self.in_features})."
            )
        if not torch.compiler.is_compiling():
            self._refresh_if_stale()
        sample = self._sample()
        y = block_ell_linear(
            x,
            self.values,
            self.col_indices,
            self.bias,
            row_group=self.row_group,
            num_live=self.num_live,
            index=self._index,
            probe=None if sample == "none" else self._probe,
            sample=sample,
            backend=self.backend,
        )
        if sample == "gradient" and self._fisher_probe is not None:
            y = tap_fisher(y, x, self._fisher_probe, self.B)
        return y

    def _sample(self) -> Literal["none", "norms", "gradient"]:
        """What the backward pass of a call made now collects about absent blocks."""
        if not (self.collect_candidates and self.training and torch.is_grad_enabled()):
            return "none"
        if transforms_active() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            # there probes collect nothing (torch.compiler.is_exporting is not asked: in torch 2.11
            # Dynamo says yes of all that it compiles)
            return "none"
        if not self.values.requires_grad:
            return "none"  # no step would take what they collect: it would pile up
        if not torch.compiler.is_compiling():
            self._forget_discarded()
        return "norms" if self.scorer.config.candidate_score == "outer" else "gradient"

    def _forget_discarded(self) -> None:
        """Throw statistics away where the gradients of their backward pass were thrown away.

        As by who passes over a batch, or whose other loss went through this layer, too:
        `optimizer.zero_grad()` knows nothing of probes.
        """
        if self._probe.grad is not None and self.values.grad is None:
            self._probe.grad = None
            if self._fisher_probe is not None:
                self._fisher_probe.grad = None

    @property
    def density(self) -> float:
        """Live blocks over all positions."""
        return self.num_live / self.C

    def get_density(self) -> float:
        """Live blocks over all positions; differs from the asked one by rounding to blocks."""
        return self.density

    @property
    def weight(self) -> Tensor:
        """`to_dense()`, for code that looks at the weight of any linear layer, as torch's own
        transformer layers do in evaluation mode. Made anew each time: writing into it changes
        nothing; set `values`."""
        return self.to_dense()

    def to_dense(self) -> Tensor:
        """The weight as a dense [out_features, in_features] tensor; differentiable."""
        refuse_shards(self)
        live = self.num_live
        return fmt.to_dense(
            self.values[:, :live], self.col_indices[:, :live], self.R, self.C, live, self.B
        )

    # -- the three levels of the clock --------------------------------------------------------

    def accumulate_scores(self) -> None:
        """Level 0, after every optimizer step and before gradients are cleared."""
        accumulate_scores([self])

    def score_step(self) -> None:
        """Level 1: turn what was collected since the last call into mean statistics."""
        self.scorer.fold()

    @torch.no_grad()
    def topology_step(
        self,
        generator: torch.Generator | None = None,
        global_step: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> TopologyDecisionResult:
        """Level 2: replace weak blocks by promising absent ones, in place.

        A newcomer takes the slot of the block it replaces; survivors keep slot, weights, score, age
        and optimizer state to the bit. No host synchronisation.

        Args:
            generator: source of exploration and new weights; the same on every rank. Default: one
                made from `seed` and `global_step`, or else the number of decisions so far.
            global_step: optimizer step, recorded in the result.
            optimizer: if given, its state of the replaced slots is reset.
        """
        dist_sync.sync_topology_scores([self])
        if generator is None:
            step = global_step if global_step is not None else int(self.scorer.num_decisions)
            generator = decision_generator(self.seed, step, "")
        result = self._decide(generator, global_step)
        if optimizer is not None:
            reset_optimizer_state([optimizer], self.values, result.swapped)
        return result

    @torch.no_grad()
    def _decide(
        self,
        generator: torch.Generator,
        global_step: int | None,
        retention: SwapRetention | None = None,
    ) -> TopologyDecisionResult:
        if retention is None:
            return decide([self], [generator], global_step)[0]
        old = LiveBlocks(
            self.col_indices[:, : self.num_live].clone(),
            self.values[:, : self.num_live].detach().clone(),
            self.scorer.block_age[:, : self.num_live].clone(),
        )
        locked, cost = retention.locked_and_cost(self)
        (result,) = decide(
            [self], [generator], global_step, locked=locked[None], cost=cost[None], zero_birth=True
        )
        retention.after_swap(self, result.swapped, old)
        return result

    @torch.no_grad()
    def grow(
        self,
        density: float,
        generator: torch.Generator | None = None,
        *,
        scores: Tensor | None = None,
    ) -> int:
        """Bring spare slots to life until the layer has `density`; returns new blocks per row.

        The new blocks start at zero, so the layer's function does not change; no live slot is
        touched and no tensor changes its shape. Every row (group) grows where its candidate scores
        are largest; without statistics the columns are drawn from `generator`.

        Args:
            density: share of blocks present afterwards.
            generator: see above.
            scores: float [R, C], 0 or more: grow where they are largest instead.

        Raises:
            ValueError: `density` is below the present one or above `max_density`, or `scores` have
                another shape.
        """
        return grow(self, density, generator, scores)

    # -- statistics ---------------------------------------------------------------------------

    def block_scores(self) -> Tensor:
        """Keep scores of the live blocks, float32 [R, num_live]; NaN where not yet measured."""
        scores = self.scorer.present_scores(self.values.detach(), self.col_indices)
        return scores[:, : self.num_live]

    def get_topology_stats(self) -> TopologyStats:
        """Density, mean score and age, column entropy, number of blocks. Copies to the host."""
        live = self.num_live
        return TopologyStats(
            density=self.density,
            avg_block_score=float(self.block_scores().nanmean().nan_to_num(0.0)),
            avg_block_age=float(self.scorer.block_age[:, :live].float().mean()),
            column_entropy=float(compute_column_entropy(self.col_indices, self.C)),
            num_blocks=self.R * live,
        )

    def get_block_age_distribution(self, bins: int = 20) -> AgeHistogram:
        """Histogram of the live blocks' ages in optimizer steps since birth."""
        if bins < 1:
            raise ValueError(f"bins (={bins}) must be at least 1.")
        ages = self.scorer.block_age[:, : self.num_live].cpu().numpy()
        counts, edges = np.histogram(ages, bins=bins, range=(0, max(1, int(ages.max()))))
        return AgeHistogram(counts.astype(np.int64), edges)

    def swap_rates(self) -> list[float]:
        """Swap rates of the layer's last decisions (at most 64), oldest first."""
        return self.scorer.swap_rates()

    def topology_checksum(self) -> str:
        """Digest of indices, ages and weights: equal on all ranks, or they have diverged."""
        return fmt.topology_checksum(
            self.col_indices.cpu().numpy(),
            self.scorer.block_age.cpu().numpy(),
            self.values.detach().float().cpu().numpy(),
        )

    def sync_topology_scores(self) -> None:
        """Average scores and statistics over all ranks of torch.distributed, if it is in use."""
        dist_sync.sync_topology_scores([self])

    def extra_repr(self) -> str:
        spare = f", spare={self.K - self.num_live}" if self.num_live < self.K else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, tile_size={self.B}, density={self.density:.3g}, "
            f"row_group={self.row_group}{spare}"
        )

    # -- derived tensors ----------------------------------------------------------------------
    # Plain attributes, rebuilt from col_indices: not state, so not trusted from a file, and not
    # buffers, which some loaders fill with garbage.

    def _make_derived(self) -> None:
        device = self.col_indices.device
        self._index = fmt.transposed_index(self.col_indices.clamp(min=-1), self.C)
        kind: dict[str, Any] = {"dtype": torch.float32, "device": device, "requires_grad": True}
        self._probe = torch.zeros(probe_size(self.R, self.C), **kind)
        self._fisher_probe: Tensor | None = None
        if self.scorer.config.candidate_score == "loss":
            self._fisher_probe = torch.zeros(self.R * self.C + 1, **kind)
        self._index_source: tuple[Tensor, int] | None = None

    def _refresh_derived(self) -> None:
        """Rebuild the transposed index in place, so that compiled graphs see it."""
        if self.col_indices.device.type != "meta":
            refresh_derived([self])

    def _mark_derived(self) -> None:
        """Say that what is derived fits `col_indices` as they are now."""
        columns = self.col_indices
        self._index_source = columns, _version(columns)

    def _is_stale(self) -> bool:
        """Whether what is derived may not fit `col_indices` any more."""
        columns, source = self.col_indices, self._index_source
        return source is None or source[0] is not columns or source[1] != _version(columns)

    def _refresh_if_stale(self) -> None:
        """Notice what was done to `col_indices` around this class, as some loaders do.

        Not of indices that `torch.func` maps over: products composed for it need nothing derived.
        """
        if self._is_stale() and not is_functorch_wrapped_tensor(self.col_indices):
            # indices are nobody's input, but inside a transform of torch.func even their copy on
            # the host would be one of its wrapped tensors, which cannot be read; and what is looked
            # up once has no place in what torch.jit.trace repeats at every call
            refuse_replica(self)
            trace = torch._C._get_tracing_state()
            torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
            try:
                with torch._C._DisableFuncTorch():
                    self._check_topology()
            finally:
                torch._C._set_tracing_state(trace)  # type: ignore[attr-defined]

    def _check_topology(self) -> None:
        """Validate indices that came from outside and rebuild what depends on them."""
        if self.col_indices.device.type == "meta":
            return
        if self.col_indices.dtype is not torch.int32 and not self.col_indices.is_floating_point():
            self.col_indices = self.col_indices.to(torch.int32)  # loaded by assignment
        host = self.col_indices.cpu().numpy()
        check_own_columns(host, self.C, self.row_group)
        self.num_live = int((host[0] >= 0).sum())
        if self._probe.device != self.col_indices.device:  # an empty model was filled
            self._make_derived()
        self.scorer.follow_buffers()
        self._refresh_derived()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: a copy belongs to no manager yet."""
        return {**self.__dict__, "_clock": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CMSBlockLinear:
        super()._apply(fn, recurse)
        for parameter in self._parameters.values():
            # `.to(memory_format=torch.channels_last)` takes tiles for images and changes strides
            if parameter is not None and not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.contiguous()
        # a cast (.half(), .to(dtype)) leaves the indices alone; a move takes the derived along
        if self._probe.device != self.col_indices.device:
            self._make_derived()
        self._index_source = None
        return self


def _version(tensor: Tensor) -> int:
    # tensors made in inference mode count no versions; they cannot be changed in place either
    return -2 if tensor.is_inference() else tensor._version
