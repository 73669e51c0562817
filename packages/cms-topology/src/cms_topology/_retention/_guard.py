"""RetentionGuard: lets an optimizer train without disturbing what is consolidated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cms_topology._retention._consolidation import Consolidation
from cms_topology._retention._names import parameter_names, sparse_by_values, unwrap
from cms_topology._retention._precision import full_float32
from cms_topology._retention._projection import ProjectionBatch
from cms_topology._retention._state import WeightState
from cms_topology._retention._still import StillParameters
from cms_topology._retention._units import ProtectedWeight

DEFAULT_TOLERANCE_NATS = 0.01


class RetentionGuard:
    """Holds a model to what it has learned, whatever optimizer trains it on.

    After each `optimizer.step()`, by a hook:

    - weight matrices are kept in bounds by one or both controls. `eps` acts on the update:
      dW <- dW eps (K + eps I)^-1, the exact proximal step of (1/2 eps) tr(dW K dW^T). `drift` acts
      on the displacement since the guard was built: W - W_A is projected onto the ellipsoid
      D = tr((W - W_A) K (W - W_A)^T) / tr(W_A K W_A^T) <= drift, so D never exceeds its budget.
    - norm gains, biases, used embedding rows and every parameter without statistics stay to the
      bit. Unused embedding rows train freely.

    Acting after the optimizer, it also undoes what momentum and weight decay do to protected parts,
    and needs to know nothing about the optimizer, gradient scaling, accumulation or compilation.

    ```python
    memory = consolidate(model, batches_of_a, task="a")
    guard = RetentionGuard(model, optimizer, memory)
    ...  # train on the next task as usual
    guard.remove()
    ```

    Args:
        model: wrapped by DDP or torch.compile or not. Its present weights are the anchor W_A.
        optimizer: hooked; None if you call `guard.step()` yourself after every step.
        memory: what is kept, from `consolidate`.
        drift: budget of relative drift per weight matrix, > 0. "auto": the drift at which the
            consolidated tasks' own loss was measured to rise by `tolerance`. None: no such control.
        eps: strength of the control of updates, as a fraction of the inputs' mean energy: 0 allows
            only what changes no output on the consolidated inputs, infinity everything. None: no
            such control, unless `drift` is None too; then 0.01.
        ramp: optimizer steps over which the drift budget widens from nothing to `drift`, linearly.
            The first gradients of a new task are coherent and point against the old one.
        every: optimizer steps between two projections, counted on accumulated updates. Parameters
            that stay are put back at every step.
        tolerance: nats, see `drift`.

    Raises:
        ValueError: a setting outside its range, or a memory that does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        memory: Consolidation,
        *,
        drift: str | float | None = "auto",
        eps: float | None = None,
        ramp: int = 0,
        every: int = 1,
        tolerance: float = DEFAULT_TOLERANCE_NATS,
    ) -> None:
        self.every, self.ramp, self.tolerance = every, ramp, tolerance
        self.budget = _budget(drift, memory, tolerance)
        """Budget of relative drift; None without that control."""
        self.eps = 0.01 if eps is None and self.budget is None else eps
        """Strength of the control of updates; None without it."""
        if every < 1:
            raise ValueError(f"every (={every}) must be at least 1.")
        if ramp < 0:
            raise ValueError(f"ramp (={ramp}) must be 0 or more steps.")
        if self.eps is not None and not self.eps >= 0:
            raise ValueError(f"eps (={eps}) must be 0 or more.")
        if self.eps == math.inf:
            self.eps = None
        self.memory = memory
        self.model = unwrap(model)
        self.steps = 0
        """Optimizer steps seen."""
        weights, self._still = _sort(self.model, memory)
        self._active = self.eps is not None or self.budget is not None
        with full_float32(), torch.no_grad():
            states = {weight.name: WeightState.of(weight) for weight in weights}
        self._weights = weights
        self._arrange(states)
        self._hook = None
        if optimizer is not None:
            self._hook = optimizer.register_step_post_hook(lambda *_: self.step())

    # -- the work -----------------------------------------------------------------------------

    def step(self) -> None:
        """Do what is due after one optimizer step; the hook calls it."""
        self.steps += 1
        if not self._active:
            return
        self._still.put_back()
        self._notice_changes()
        if self.steps % self.every == 0:
            self.flush()

    @property
    def budget_now(self) -> float | None:
        """The drift budget at this step, on its way up the ramp."""
        if self.budget is None or self.steps >= self.ramp:
            return self.budget
        return self.budget * max(self.steps, 1) / self.ramp

    def flush(self) -> None:
        """Project now, in the middle of an interval; before an evaluation, for example."""
        if not self._active:
            return
        self._notice_changes()
        with full_float32():
            for batch in self._batches:
                batch.project(self.eps, self.budget_now)

    def refresh(self) -> None:
        """Take note that blocks came or went; `flush` does so by itself when it notices.

        What a row held on blocks that are gone is absorbed by its other inputs, in the anchor;
        weights that do not follow (see `TopologyManager(retention=...)`) are drawn there.
        """
        states: dict[str, WeightState] = {}
        with full_float32():
            for batch in self._batches:
                for weight, state in zip(batch.weights, batch.states(), strict=True):
                    states[weight.name] = state.carried_over(weight)
        self._arrange(states)

    def _notice_changes(self) -> None:
        if self._topologies() != self._known_topologies:
            self.refresh()

    def _arrange(self, states: Mapping[str, WeightState]) -> None:
        """Batch the weights by shape, which growth may have changed."""
        self._batches = [
            ProjectionBatch(group, [states[weight.name] for weight in group])
            for group in _by_shape(self._weights)
        ]
        self._known_topologies = self._topologies()

    def _topologies(self) -> list[int]:
        return [w.layer.col_indices._version for w in self._weights if w.layer is not None]

    def remove(self) -> None:
        """Project what is pending and let the optimizer go."""
        self.flush()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # -- figures ------------------------------------------------------------------------------

    def drift(self) -> dict[str, float]:
        """Relative drift D of every weight matrix as it is now, by parameter name."""
        found: dict[str, float] = {}
        with full_float32():
            for batch in self._batches:
                found.update(zip(batch.names, batch.measure().tolist(), strict=True))
        return found

    def metrics(self) -> dict[str, float]:
        """Figures of the last projection, for a log."""
        drifts = torch.cat([batch.last_drift for batch in self._batches])
        tight = torch.cat([batch.multiplier > 0 for batch in self._batches])
        figures = {
            "retention/drift_mean": float(drifts.mean()),
            "retention/drift_max": float(drifts.max()),
            "retention/layers_at_budget_frac": float(tight.double().mean()),
        }
        if self.budget is not None:
            figures["retention/budget"] = float(self.budget_now or 0.0)
        if self.eps is not None:
            figures["retention/eps"] = self.eps
        return figures

    @property
    def still(self) -> list[str]:
        """Names of the parameters that stay as a whole."""
        return self._still.names

    @property
    def num_bytes(self) -> int:
        """Bytes the guard holds beside the model and the memory."""
        return self._still.num_bytes + sum(batch.num_bytes for batch in self._batches)

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Anchors, what is pending in the interval, and the step; the memory has its own state."""
        weights = {
            weight.name: state.tensors()
            for batch in self._batches
            for weight, state in zip(batch.weights, batch.states(), strict=True)
        }
        settings = {"budget": self.budget, "eps": self.eps, "ramp": self.ramp, "every": self.every}
        return {
            "steps": self.steps,
            "settings": settings,
            "weights": weights,
            "still": self._still.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, with its settings; load the model's state first.

        Raises:
            ValueError: the state is that of another model.
        """
        mine, theirs = {weight.name for weight in self._weights}, set(state["weights"])
        if mine != theirs:
            raise ValueError(
                f"state (with {len(theirs)} weight matrices) must be of this model (with "
                f"{len(mine)}); they differ in {sorted(mine ^ theirs)[0]!r}."
            )
        self.steps = int(state["steps"])
        for name, value in state["settings"].items():
            setattr(self, name, value)
        self._active = self.eps is not None or self.budget is not None
        self._still.load_state_dict(state["still"])
        states = {}
        for weight in self._weights:
            saved = state["weights"][weight.name]
            states[weight.name] = WeightState.restored(weight, saved)
        with full_float32():
            states = {w.name: states[w.name].carried_over(w) for w in self._weights}
        self._arrange(states)


def _budget(drift: str | float | None, memory: Consolidation, tolerance: float) -> float | None:
    if not tolerance > 0:
        raise ValueError(f"tolerance (={tolerance}) must be greater than 0 nats.")
    if isinstance(drift, str):
        if drift != "auto":
            raise ValueError(f"drift (={drift!r}) must be 'auto', a number or None.")
        measured = memory.drift_at(tolerance)
        if measured is None:
            raise ValueError(
                "drift (='auto') needs a sensitivity measured at consolidation; call consolidate "
                "with a loss and sensitivity_batches >= 1, or pass a number, or None with eps."
            )
        return measured
    if drift is None or drift == math.inf:
        return None
    if not drift > 0:
        raise ValueError(f"drift (={drift}) must be greater than 0; for no drift at all use eps=0.")
    return float(drift)


def _sort(model: nn.Module, memory: Consolidation) -> tuple[list[ProtectedWeight], StillParameters]:
    """Which parameters are projected, and which stay."""
    names = parameter_names(model)
    missing = sorted((set(memory.layers) | set(memory.rows)) - set(names.values()))
    if missing:
        raise ValueError(
            f"memory (of tasks {memory.tasks}) must fit the model: it has no parameter "
            f"{missing[0]!r}; pass the model that was consolidated, or one built like it."
        )
    sparse = sparse_by_values(model)
    weights = []
    still = StillParameters()
    for parameter, name in names.items():
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"{name} (={type(parameter).__name__}) must not be sharded: retention under FSDP "
                "or tensor parallelism is not supported; use DistributedDataParallel."
            )
        used = memory.rows.get(name)
        indices = None if used is None else used.nonzero()[:, 0].to(parameter.device)
        if indices is not None:
            still.add(name, parameter, indices)
        if name in memory.layers:
            weight = ProtectedWeight(
                name, parameter, memory.layers[name], sparse.get(parameter), indices
            )
            if weight.memory.covariance.n != _inputs(weight):
                raise ValueError(
                    f"memory of {name} (={weight.memory.covariance.n} inputs) must fit the layer "
                    f"(={_inputs(weight)} inputs); pass the model that was consolidated."
                )
            weights.append(weight)
        elif indices is None:
            still.add(name, parameter)
    return weights, still


def _inputs(weight: ProtectedWeight) -> int:
    layer = weight.layer
    return weight.parameter.shape[1] if layer is None else layer.in_features


def _by_shape(weights: list[ProtectedWeight]) -> list[list[ProtectedWeight]]:
    groups: dict[Any, list[ProtectedWeight]] = {}
    for weight in weights:
        key = (weight.shape, weight.parameter.dtype, weight.parameter.device)
        groups.setdefault(key, []).append(weight)
    return list(groups.values())
