"""Which layers a decision is about, by what they did since the last one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from cms_topology import _distributed as dist_sync
from cms_topology._convert import sparse_layers
from cms_topology._optimizers import trained_by

if TYPE_CHECKING:
    import torch.distributed as dist

    from cms_topology._linear import CMSBlockLinear


class Participation:
    """To some layers a decision would bring blocks by scores of long ago, or that nobody trains.

    Args:
        layers: by name.
        optimizers: that train them; none if they are not known.
    """

    def __init__(self, layers: Mapping[str, CMSBlockLinear], optimizers: list[Any]) -> None:
        self._layers, self._optimizers = layers, optimizers
        # names of layers that had a gradient, and of those that had one in steps that collect
        # statistics of absent blocks, with and without these
        self._trained: set[str] = set()
        self._sampled: set[str] = set()
        self._unsampled: set[str] = set()
        self._said: set[str] = set()

    def note(self, sampled: bool) -> None:
        """Remember what a step did, before its gradients and statistics are taken.

        Args:
            sampled: whether any layer was to collect statistics.
        """
        if len(self._trained) < len(self._layers):
            self._trained |= {n for n, x in self._layers.items() if x.values.grad is not None}
        if not sampled:
            return
        for name, layer in self._layers.items():
            if layer.collect_candidates and layer.values.grad is not None:
                without = layer._probe.grad is None
                (self._unsampled if without else self._sampled).add(name)

    def take(self, group: dist.ProcessGroup | None) -> dict[str, CMSBlockLinear]:
        """The layers that a decision now is about; warns, once, where a mistake is likely.

        Args:
            group: the ranks that decide together; default: all.
        """
        layers, held = self._layers, trained_by(self._optimizers)
        found = {n: x for n, x in layers.items() if n in self._trained and x.values.requires_grad}
        idle = [n for n, x in found.items() if self._optimizers and id(x.values) not in held]
        flags = [n in these for these in (self._sampled, self._unsampled) for n in layers]
        device = next(iter(layers.values())).col_indices.device
        flags = dist_sync.on_any_rank(flags, device, group)
        seen = zip(layers, flags[: len(layers)], flags[len(layers) :], strict=True)
        unknown = [n for n, sampled, unsampled in seen if unsampled and not sampled and n in found]
        self._trained, self._sampled, self._unsampled = set(), set(), set()
        self._warn_once(
            idle,
            "have gradients but are in none of the optimizers given, so they keep their blocks; "
            "pass all optimizers of the model, or freeze these layers",
        )
        self._warn_once(
            unknown,
            "collected no statistics of absent blocks for this decision, so they keep their "
            "blocks; in the step before one they must be in training mode, and gradients must "
            "come from backward(), not from torch.autograd.grad",
        )
        return {n: x for n, x in found.items() if n not in idle and n not in unknown}

    def look_for_others(self, model: nn.Module) -> None:
        """Warn, once, of sparse layers that came into the model since it was managed."""
        known = set(map(id, self._layers.values()))
        self._warn_once(
            [name for name, layer in sparse_layers(model).items() if id(layer) not in known],
            "came into the model after this TopologyManager was made, so their blocks stay; make a "
            "new one and load this one's state_dict() into it",
        )

    def state_dict(self) -> dict[str, list[str]]:
        """Names, for a checkpoint."""
        return {"trained": sorted(self._trained), "sampled": sorted(self._sampled)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned; names that older checkpoints lack are all names."""
        self._trained = set(state.get("trained", self._layers))
        self._sampled, self._unsampled = set(state.get("sampled", ())), set()

    def _warn_once(self, names: list[str], said: str) -> None:
        if names and said not in self._said:
            self._said.add(said)
            # by way of our caller, of the manager's decision and of its step
            warnings.warn(f"the layers {names} {said}.", stacklevel=5)
