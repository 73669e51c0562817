"""What is kept of earlier tasks: statistics of their inputs and errors, none of their data.

Legend: R block rows, C block columns of a layer; n its inputs, m its outputs; V rows of an
embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cms_topology._retention._covariance import Covariance
from cms_topology._retention._layout import Layout
from cms_topology._retention._probes import Probes

_VERSION = 1


@dataclass(frozen=True, eq=False)
class LayerMemory:
    """What one weight matrix needs to know about the tasks it has learned.

    Statistics of several tasks are weighted sums; all are per token.
    """

    covariance: Covariance
    """K = sum over tasks of weight * E[x x^T] / mean diagonal, [n, n]: for one task of weight 1 its
    mean diagonal is 1."""
    energy: Tensor
    """0-d: the mean diagonals before normalisation, averaged over tasks; K * energy is E[x x^T]."""
    usage: Tensor | None = None
    """F [R, C], the trace of the per-token Fisher information of every block, present or not:
    E[|delta_r|^2 |x_c|^2], delta the gradient of one token's loss by the output. A dense layer has
    R = m and C = 1."""
    error: Tensor | None = None
    """[R] E[|delta_r|^2] / B, mean squared error signal of the outputs of a block row."""
    live: Tensor | None = None
    """bool [R, C]: blocks that were present at a consolidation; None for a dense layer."""
    inputs_first: bool = False
    """How a dense layer's parameter is stored; see `Layout`."""
    stacked: bool = False
    """The same."""

    @property
    def layout(self) -> Layout:
        """How a dense layer's parameter is cut into matrices."""
        return Layout(self.covariance.groups, self.inputs_first, self.stacked)

    def plus(self, other: LayerMemory, weights: tuple[float, float]) -> LayerMemory:
        """Statistics of both; `weights` are those of the energies' average."""
        a, b = weights[0] / sum(weights), weights[1] / sum(weights)
        return LayerMemory(
            covariance=self.covariance.plus(other.covariance),
            energy=a * self.energy + b * other.energy,
            usage=_sum(self.usage, other.usage),
            error=_sum(self.error, other.error),
            live=_union(self.live, other.live),
            inputs_first=self.inputs_first,
            stacked=self.stacked,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors by name."""
        named = {f"covariance.{k}": v for k, v in self.covariance.tensors().items()}
        named["energy"] = self.energy
        for name in ("usage", "error", "live"):
            value = getattr(self, name)
            if value is not None:
                named[name] = value
        return named

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, inputs_first: bool = False, stacked: bool = False
    ) -> LayerMemory:
        """The inverse of `tensors`, which do not say how the parameter is stored."""
        head = "covariance."
        covariance = {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
        others = {k: v for k, v in tensors.items() if not k.startswith(head)}
        return cls(Covariance(**covariance), **others, inputs_first=inputs_first, stacked=stacked)


@dataclass(eq=False, repr=False)
class Consolidation:
    """Everything that is kept of the consolidated tasks. Made by `consolidate`.

    Keys of `layers` and `rows` are names of parameters, without the prefixes of DDP and
    torch.compile.
    """

    layers: dict[str, LayerMemory] = field(default_factory=dict)
    """Per weight matrix that is multiplied with inputs, its statistics."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Per embedding matrix, bool [V]: rows that a task looked up."""
    tasks: list[str] = field(default_factory=list)
    """Names of the tasks, in the order of consolidation."""
    weights: list[float] = field(default_factory=list)
    """Weight of each task."""
    drift_levels: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    """Relative drifts D at which the tasks' own loss was measured, ascending; see `drift_at`."""
    drift_rises: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    """[tasks, levels]: rise of each task's loss in nats when all layers drift by D at random."""

    probes: list[Probes] = field(default_factory=list)
    """Inputs on which the drift is watched; empty if none were kept."""
    touched: list[str] | None = None
    """Parameters that some task used; all others may train freely. None: not known."""
    unseen: dict[str, str] = field(default_factory=dict)
    """Parameters that some task used where no product is seen, and by which function: they stay,
    whatever is known of them from elsewhere."""

    def __repr__(self) -> str:
        """Names and sizes; the tensors themselves would fill pages."""
        return (
            f"Consolidation(tasks={self.tasks}, {len(self.layers)} weight matrices, "
            f"{len(self.rows)} embeddings, {sum(len(p.inputs) for p in self.probes)} probes, "
            f"{self.num_bytes:,} bytes)"
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    def drift_at(self, rise: float) -> float | None:
        """The drift D that raises the loss of the most sensitive task by `rise` nats.

        Interpolated on a logarithmic scale between the measured levels, and never beyond them.
        None when nothing was measured.
        """
        if self.drift_levels.numel() == 0:
            return None
        levels = self.drift_levels.double().log().tolist()
        log_rise = float(torch.tensor(rise, device="cpu").log())
        found = []
        for rises in self.drift_rises.double().clamp(min=1e-12).log().tolist():
            found.append(_crossing(levels, rises, log_rise))
        return float(torch.tensor(min(found), device="cpu").exp())

    def plus(self, other: Consolidation) -> Consolidation:
        """What is kept of the tasks of both."""
        weights = (sum(self.weights), sum(other.weights))
        unseen = {**other.unseen, **self.unseen}
        layers = dict(self.layers)
        for name, layer in other.layers.items():
            if name in layers and not layers[name].layout.alike(layer.layout):
                unseen[name] = "its transpose"
            else:
                layers[name] = layers[name].plus(layer, weights) if name in layers else layer
        rows = dict(self.rows)
        for name, used in other.rows.items():
            rows[name] = rows[name] | used if name in rows else used
        for name in unseen:
            layers.pop(name, None)
            rows.pop(name, None)
        levels, rises = self.drift_levels, self.drift_rises
        if levels.numel() == 0:
            levels, rises = other.drift_levels, other.drift_rises
        elif other.drift_levels.numel():
            rises = torch.cat((rises, other.drift_rises))
        return Consolidation(
            layers,
            rows,
            self.tasks + other.tasks,
            self.weights + other.weights,
            levels,
            rises,
            self.probes + other.probes,
            None
            if self.touched is None or other.touched is None
            else sorted({*self.touched, *other.touched}),
            unseen,
        )

    def low_rank(self, rank: int) -> Consolidation:
        """The same with at most `rank` eigenvectors of every covariance."""
        layers = {
            name: replace(layer, covariance=layer.covariance.low_rank(rank))
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def to(self, device: torch.device | str) -> Consolidation:
        """The same on another device."""
        moved = {k: v.to(device) for k, v in self.to_tensors().items()}
        return Consolidation.from_tensors(moved)

    # -- state --------------------------------------------------------------------------------

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as contiguous tensors by name, fit for a safetensors file."""
        about = {
            "version": _VERSION,
            "tasks": self.tasks,
            "weights": self.weights,
            "touched": self.touched,
            "unseen": self.unseen,
            "inputs_first": [name for name, layer in self.layers.items() if layer.inputs_first],
            "stacked": [name for name, layer in self.layers.items() if layer.stacked],
        }
        text = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8, device="cpu")
        tensors = {
            "about": text,
            "drift_levels": self.drift_levels,
            "drift_rises": self.drift_rises,
        }
        for name, layer in self.layers.items():
            tensors.update({f"layers/{name}/{k}": v for k, v in layer.tensors().items()})
        tensors.update({f"rows/{name}": used for name, used in self.rows.items()})
        for i, probes in enumerate(self.probes):
            tensors.update({f"probes/{i}/{k}": v for k, v in probes.tensors().items()})
        return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Consolidation:
        """The inverse of `to_tensors`.

        Raises:
            ValueError: the tensors are not those of a consolidation, or of a later version.
        """
        if "about" not in tensors:
            raise ValueError(
                f"tensors (={sorted(tensors)[:5]}...) must hold 'about' and what "
                "Consolidation.to_tensors() wrote beside it."
            )
        about = json.loads(bytes(tensors["about"].tolist()).decode())
        if about["version"] != _VERSION:
            raise ValueError(
                f"version (={about['version']}) of the consolidation must be {_VERSION}; "
                "read it with the release of cms-topology that wrote it."
            )
        layers: dict[str, dict[str, Tensor]] = {}
        probes: dict[int, dict[str, Tensor]] = {}
        rows = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "layers":
                name, _, part = rest.rpartition("/")
                layers.setdefault(name, {})[part] = tensor
            elif kind == "probes":
                number, _, part = rest.partition("/")
                probes.setdefault(int(number), {})[part] = tensor
            elif kind == "rows":
                rows[rest] = tensor
        return cls(
            {
                name: LayerMemory.from_tensors(
                    parts,
                    inputs_first=name in about.get("inputs_first", ()),
                    stacked=name in about.get("stacked", ()),
                )
                for name, parts in layers.items()
            },
            rows,
            about["tasks"],
            about["weights"],
            tensors["drift_levels"],
            tensors["drift_rises"],
            [Probes.from_tensors(probes[i]) for i in sorted(probes)],
            about.get("touched"),
            about.get("unseen", {}),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The same as `to_tensors`."""
        return self.to_tensors()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was taken of, whatever this one held."""
        self.__dict__.update(Consolidation.from_tensors(state).__dict__)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _union(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a | b


def _crossing(levels: list[float], rises: list[float], target: float) -> float:
    """Where the piecewise linear curve first exceeds `target`; its ends where it never or always
    does."""
    if rises[0] >= target:
        return levels[0]
    for i in range(1, len(levels)):
        if rises[i] >= target:
            share = (target - rises[i - 1]) / (rises[i] - rises[i - 1])
            return levels[i - 1] + share * (levels[i] - levels[i - 1])
    return levels[-1]
