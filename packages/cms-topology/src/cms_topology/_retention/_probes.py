"""Probes: inputs on which a model is asked whether it still answers as it did.

Legend: P probes, T positions of a probe, V classes, N answers kept, k classes kept of each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cms_topology import _distributed as dist_sync
from cms_topology._devices import on
from cms_topology._retention._capture import captured, undisturbed
from cms_topology._retention._precision import products

LOST_NATS = math.log(2)

LogitsFn = Callable[[nn.Module, Tensor], Tensor]
Sampler = Callable[[nn.Module, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Probes:
    """Inputs, and what the consolidated model answered where it was sure. Made by `make_probes`."""

    inputs: Tensor
    """[P, ...], whatever the model takes."""
    positions: Tensor
    """int64 [N]: kept answers among the flattened leading dimensions of the logits."""
    classes: Tensor
    """int64 [N, k]: most probable classes of each answer."""
    log_probs: Tensor
    """float32 [N, k]: their log-probabilities."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by field name."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Probes:
        """The inverse of `tensors`."""
        return cls(**tensors)

    def to(self, device: torch.device | str) -> Probes:
        """The same on another device."""
        return Probes(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    @torch.no_grad()
    def divergence(self, logits: Tensor, limit: float = LOST_NATS) -> Tensor:
        """Mean over the kept answers of min(KL(then || now), limit) in nats, float64 0-d.

        Classes that were not kept count together as one, which bounds the divergence from below
        (data processing inequality).

        Args:
            logits: [..., V] of all `inputs`, now.
            limit: what a lost answer counts. A certain answer whose probability has fallen to one
                half has a divergence of log 2; without a limit a handful of answers, each lost by
                many nats, would speak for all.
        """
        flat = logits.flatten(0, -2)
        kernel = _kernel() if flat.is_cuda and flat.dtype != torch.float64 else None
        if kernel is not None:
            kept = (self.positions, self.classes, self.log_probs)
            with on(flat.device):  # where kernels are launched
                found: Tensor = kernel.divergences(flat.contiguous(), *kept, limit)
            return found.mean()
        return self._by_torch(flat, limit)

    def _by_torch(self, logits: Tensor, limit: float) -> Tensor:
        """The same, and the kernel's reference: several copies of the logits."""
        # in float32, like `log_probs`: for large V twice the memory would be felt
        chosen = _widened(logits[self.positions])
        now = chosen.log_softmax(-1).gather(1, self.classes).double()
        then = self.log_probs.double()
        inside = (then.exp() * (then - now)).sum(1)
        p, q = ((1 - t.exp().sum(1)).clamp(min=1e-12) for t in (then, now))
        return (inside + p * (p / q).log()).clamp(max=limit).mean()


@functools.cache
def _kernel() -> ModuleType | None:
    """`_divergence_kernel`; None without Triton."""
    try:
        from cms_topology._retention import _divergence_kernel
    except ImportError:
        return None
    return _divergence_kernel


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def default_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """`model(inputs)`, or the "logits" in it."""
    result: Any = model(inputs)
    logits: Tensor = result if isinstance(result, Tensor) else result["logits"]
    return logits


@torch.no_grad()
def make_probes(
    model: nn.Module,
    source: Tensor | Sampler,
    *,
    logits_fn: LogitsFn = default_logits,
    confidence: float = 0.5,
    classes: int = 64,
    max_answers: int = 8192,
    generator: torch.Generator | None = None,
) -> Probes:
    """Keep what a model answers on some inputs; best on inputs it has made up itself.

    Args:
        model: at the consolidation.
        source: inputs [P, ...], or (model, generator) -> inputs, which draws them from the model
            (see `sample_tokens`), so that no data of the task need be kept.
        logits_fn: (model, inputs) -> [..., V]. Default: the model's result, or its "logits".
        confidence: answers count only where the most probable class has at least this probability:
            what the model itself does not know need not be kept.
        classes: k, most probable classes kept of each answer.
        max_answers: N at most; evenly spaced ones are kept.
        generator: of the sampler, on the CPU; default: one of a fixed seed.

    Raises:
        ValueError: `confidence` outside [0, 1], or no answer reaches it.
    """
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence (={confidence}) must be in [0, 1].")
    rng = generator if generator is not None else torch.Generator().manual_seed(0)
    with undisturbed(model):
        inputs = source if isinstance(source, Tensor) else source(model, rng)
        logits = logits_fn(model, inputs)
    log_probs = logits.flatten(0, -2).float().log_softmax(-1)
    sure = (log_probs.amax(1).exp() >= confidence).nonzero()[:, 0]
    if sure.numel() == 0:
        raise ValueError(
            f"confidence (={confidence}) must be reached by some answer; the surest of "
            f"{len(log_probs)} has {float(log_probs.max().exp()):.3f}. Lower it, or make probes "
            "after the model has learned."
        )
    if sure.numel() > max_answers:
        spaced = torch.linspace(0, sure.numel() - 1, max_answers, device=sure.device)
        sure = sure[spaced.long()]
    top = log_probs[sure].topk(min(classes, log_probs.shape[1]), dim=1)
    return Probes(inputs.detach().clone(), sure, top.indices, top.values)


@torch.no_grad()
def known_answers(
    model: nn.Module,
    probes: Probes,
    rows: Mapping[Tensor, Tensor],
    logits_fn: LogitsFn = default_logits,
) -> Probes:
    """The answers that depend only on embedding rows the tasks use, as in a causal model.

    Other rows are free to change; what follows one in a probe would be lost however little the rest
    of the model drifts.

    Args:
        model: as it was when the probes were made.
        probes: all answers.
        rows: per embedding matrix bool [V], rows in use.
        logits_fn: see `make_probes`.

    Raises:
        ValueError: no answer is left.
    """
    seen: list[Tensor] = []

    def on_rows(weight: Tensor, indices: Tensor) -> None:
        if weight in rows:
            seen.append(rows[weight][indices])

    with captured(model, lambda *_: None, on_rows, lambda _: None):
        grid = logits_fn(model, probes.inputs).shape[:-1]
    known = torch.ones(grid, dtype=torch.bool, device=probes.positions.device)
    for used in seen:
        if used.shape == grid or used.shape == grid[-1:]:
            known = known & used.to(known.device).cumprod(-1).bool()
    kept = known.flatten()[probes.positions]
    if not kept.any():
        raise ValueError(
            f"probes (with {len(kept)} answers) must have some that follow only symbols the task "
            "uses; let the sampler draw from those (sample_tokens(allowed=...)), and not longer "
            "sequences than the task's."
        )
    parts = (probes.positions, probes.classes, probes.log_probs)
    # a copy: files do not take one tensor under two names
    return Probes(probes.inputs.clone(), *(part[kept] for part in parts))


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    first: Tensor,
    length: int,
    *,
    logits_fn: LogitsFn = default_logits,
    temperature: float = 1.0,
    allowed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Let a causal language model go on from first tokens; the plain way, without a cache.

    Args:
        model: token ids [P, t] -> logits [P, t, V] by `logits_fn`.
        first: int64 [P, t], for example random ones of the embedding rows a task uses.
        length: T, tokens per sequence in the end.
        logits_fn: see `make_probes`.
        temperature: of the sampling, > 0.
        allowed: bool [V]: draw from these only, for example the symbols a task uses.
        generator: on the CPU; default: one of a fixed seed.

    Returns:
        int64 [P, T].
    """
    if not temperature > 0:
        raise ValueError(f"temperature (={temperature}) must be greater than 0.")
    rng = generator if generator is not None else torch.Generator().manual_seed(0)
    tokens = first
    while tokens.shape[1] < length:
        logits = logits_fn(model, tokens)[:, -1].float() / temperature
        if allowed is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        p = logits.softmax(-1)
        draws = torch.rand(p.shape, generator=rng, device=rng.device).to(p).clamp(min=1e-20)
        # the smallest of -log(u) / p: an exponential race, won by class i with probability p_i
        chosen = (-draws.log() / p).argmin(-1, keepdim=True)
        tokens = torch.cat((tokens, chosen), 1)
    return tokens


@torch.no_grad()
def measure_divergences(
    model: nn.Module, probes: list[Probes], logits_fn: LogitsFn = default_logits
) -> Tensor:
    """Mean divergence of each of the given probes now, float64 [probes]; no host synchronisation.

    Under torch.distributed all ranks get the mean of theirs, so that they act alike.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        # what TF32 rounds away is far below any divergence that matters, and a float32 pass of the
        # probes would be felt in a training in half precision
        with products(full=False):
            found = [p.divergence(logits_fn(model, p.inputs)) for p in probes]
    finally:
        for module, training in modes.items():
            module.training = training
    means = torch.stack(found)
    if dist_sync.world_size() > 1:
        dist.all_reduce(means)
        means = means / dist_sync.world_size()
    return means
