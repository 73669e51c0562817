"""RetentionGuard: lets an optimizer train without disturbing what is consolidated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cms_topology._retention._budget import make_budget
from cms_topology._retention._consolidation import Consolidation
from cms_topology._retention._controller import DriftController
from cms_topology._retention._hooks import act_at_steps
from cms_topology._retention._mistakes import (
    check_optimizers,
    warn_of_no_steps,
    warn_of_running_statistics,
    warn_of_still_weights,
)
from cms_topology._retention._names import parameter_names, unwrap
from cms_topology._retention._parameters import by_shape, sort_parameters
from cms_topology._retention._precision import products
from cms_topology._retention._probes import LogitsFn, default_logits
from cms_topology._retention._projection import ProjectionBatch
from cms_topology._retention._state import WeightState
from cms_topology._retention._units import ProtectedWeight


class RetentionGuard:
    """Holds a model to what it has learned, whatever optimizer trains it on.

    After each `optimizer.step()`, by a hook:

    - weight matrices are kept in bounds by one or both controls. `eps` acts on the update:
      dW <- dW eps (K + eps I)^-1, the exact proximal step of (1/2 eps) tr(dW K dW^T). `drift` acts
      on the displacement since the guard was built: W - W_A is projected onto the ellipsoid
      D = tr((W - W_A) K (W - W_A)^T) / tr(W_A K W_A^T) <= drift, so training never exceeds it.
    - norm gains, biases, used embedding rows and every other parameter without statistics that an
      old task used stay to the bit.
    - embedding rows and parameters that no old task used, such as a new head, train freely.
    - frozen weight matrices cost nothing, until they begin to train (`requires_grad_(True)`).

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
        optimizer: hooked; None if you call `guard.step()` yourself after every step
            (and `guard.before_step()` before it, for `gradients`). Several, if they share the
            model's parameters: the first one's steps are counted. Of a wrapper the one whose
            `step()` runs (of SAM the base optimizer).
        memory: what is kept, from `consolidate`.
        drift: budget of relative drift D per weight matrix. "auto" finds it: if probes were kept at
            consolidation, by watching how far the answers to them have moved (see
            `DriftController`); else it is the drift at which the tasks' own loss was measured to
            rise by `tolerance`. A number > 0, a `DriftController` of your own, or None: no such
            control.
        eps: strength of the control of updates, as a fraction of the inputs' mean energy: 0 allows
            only what changes no output on the consolidated inputs, infinity everything and costs
            nothing. None: 0.1 beside a drift budget (it damps the start of a new task, whose
            gradients are coherent), 0.01 without.
        gradients: damp the gradients by `eps`, too, before the optimizer sees them. An optimizer
            that divides by the size of past gradients, as Adam does, otherwise divides by much
            that the guard takes away again, and learns more slowly.
        release: optimizer steps over which the control of updates lets go: eps / (1 - t/release)^2
            at step t, none from `release` on. For use beside rehearsal, which repairs what leaks
            later: the harm is done while a new task begins. 0: never.
        ramp: optimizer steps over which a fixed budget widens from nothing, as the square. The
            first gradients of a new task are coherent and point against the old one.
        every: optimizer steps between two projections, counted on accumulated updates. Parameters
            that stay are put back at every step.
        tolerance: nats that every old task may lose to this one by the measure of "auto":
            divergence of the answers to the probes since the guard was built (default 0.001), or
            rise of the loss (default 0.01).
        measure_every: optimizer steps between two looks at the probes.
        logits_fn: (model, probe inputs) -> [..., V]; default: the model's result or its "logits".

    Raises:
        ValueError: a setting outside its range, a memory that does not fit the model, or an
            optimizer of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
        memory: Consolidation,
        *,
        drift: str | float | DriftController | None = "auto",
        eps: float | None = None,
        gradients: bool = False,
        release: int = 0,
        ramp: int = 0,
        every: int = 1,
        tolerance: float | None = None,
        measure_every: int = 10,
        logits_fn: LogitsFn = default_logits,
    ) -> None:
        self.model = unwrap(model)
        self.memory = memory
        self.every, self.gradients = every, gradients
        self._budget = make_budget(
            drift,
            memory,
            next(self.model.parameters()).device,
            tolerance=tolerance,
            ramp=ramp,
            measure_every=measure_every,
            logits_fn=logits_fn,
        )
        if eps is None:
            eps = 0.01 if self._budget is None else 0.1
        self.eps: float | None = eps
        """Strength of the control of updates, at first; None without it."""
        self.release = release
        """Optimizer steps over which that control lets go; 0: never."""
        if every < 1:
            raise ValueError(f"every (={every}) must be at least 1.")
        if not eps >= 0:
            raise ValueError(f"eps (={eps}) must be 0 or more.")
        if release < 0:
            raise ValueError(f"release (={release}) must be 0 or more steps.")
        if self.eps == math.inf:
            self.eps = None
        self.steps = 0
        """Optimizer steps seen."""
        self._weights: list[ProtectedWeight] = []
        weights, self._frozen, self._still = sort_parameters(self.model, memory)
        device = next(self.model.parameters()).device
        if self._budget is not None:
            self._budget.begin(self.model)
        self._allowed = torch.zeros((), dtype=torch.float64, device=device)
        self._take_up(weights, {})
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._warned = False
        if optimizer is not None:
            optimizers = (
                [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
            )
            check_optimizers(self.model, optimizers)
            before = self.before_step if gradients else None
            self._hooks = act_at_steps(
                optimizers, self._notice_thaw, before, self.step, self._again
            )

    # -- the work -----------------------------------------------------------------------------

    def before_step(self) -> None:
        """Damp the gradients if that was asked for; a hook calls it. Without hooks, call it where
        weights that were frozen begin to train, too."""
        self._notice_thaw()
        eps = self._eps_now()
        if self.gradients and eps is not None:
            self._notice_changes()
            with products(full=False):
                for batch in self._batches:
                    batch.damp_gradients(eps)

    def step(self) -> None:
        """Do what is due after one optimizer step; the hook calls it."""
        self.steps += 1
        self._again()
        if self._active and self.steps % self.every == 0 and self._budget is not None:
            since = self.steps - self.every
            self._budget.observe(self.model, self.steps, since, self._last_drifts().max())

    def _again(self) -> None:
        """Keep to what is allowed, without counting a step."""
        if not self._active:
            return
        if not self._warned:
            warn_of_running_statistics(self.model)
            warn_of_still_weights(
                self.model,
                set(self._still.names),
                self.memory.unseen,
                self.memory.touched is not None,
            )
            self._warned = True
        self._still.put_back()
        self._notice_changes()
        if self.steps % self.every == 0:
            self.flush()

    @property
    def budget(self) -> float | None:
        """Relative drift allowed now; None without that control. Waits for the device."""
        return None if self._budget is None else float(self._budget.now(self.steps))

    def flush(self) -> None:
        """Project now, in the middle of an interval; before an evaluation, for example."""
        if not self._active:
            return
        self._notice_changes()
        if self._budget is not None:
            now = self._budget.now(self.steps)
            if isinstance(now, Tensor):
                self._allowed.copy_(now)
            else:
                self._allowed.fill_(now)
        allowed = None if self._budget is None else self._allowed
        full = self.eps is not None and self.eps < 1e-3  # updates that must not leak at all
        with products(full=full):
            for batch in self._batches:
                batch.project(self._eps_now(), allowed, narrow=self._narrow and not full)

    def _eps_now(self) -> float | None:
        if self.eps is None or self.release == 0:
            return self.eps
        left = 1 - self.steps / self.release
        return self.eps / left**2 if left > 0 else math.inf

    @property
    def _active(self) -> bool:
        return self.eps is not None or self._budget is not None

    @property
    def _narrow(self) -> bool:
        return self._budget is not None and self._budget.narrow

    def refresh(self) -> None:
        """Take note that blocks came or went; `flush` does so by itself when it notices.

        What a row held on blocks that are gone is absorbed by its other inputs, in the anchor;
        weights that do not follow (see `TopologyManager(retention=...)`) are drawn there.
        """
        states = self._states()
        with products(full=True):
            self._arrange({w.name: states[w.name].carried_over(w) for w in self._weights})

    def _states(self) -> dict[str, WeightState]:
        return {
            weight.name: state
            for batch in self._batches
            for weight, state in zip(batch.weights, batch.states(), strict=True)
        }

    def _notice_thaw(self) -> None:
        """Take up weights that were frozen until now, as they are."""
        thawed = [w for w in self._frozen if w.parameter.requires_grad]
        if thawed:
            self._frozen = [w for w in self._frozen if not w.parameter.requires_grad]
            self._take_up(thawed, self._states())

    def _take_up(self, weights: list[ProtectedWeight], states: dict[str, WeightState]) -> None:
        with products(full=True), torch.no_grad():
            new = {weight.name: WeightState.of(weight) for weight in weights}
        self._weights = [*self._weights, *weights]
        self._arrange({**states, **new})

    def _notice_changes(self) -> None:
        if self._topologies() != self._known_topologies:
            self.refresh()

    def _arrange(self, states: Mapping[str, WeightState]) -> None:
        """Batch the weights by shape, which growth may have changed."""
        self._batches = [
            ProjectionBatch(
                group,
                [states[weight.name] for weight in group],
                controls_updates=self.eps is not None,
            )
            for group in by_shape(self._weights)
        ]
        self._known_topologies = self._topologies()

    def _topologies(self) -> list[int]:
        return [w.layer.col_indices._version for w in self._weights if w.layer is not None]

    def remove(self) -> None:
        """Project what is pending and let the optimizer go."""
        if self._hooks and self.steps == 0:
            warn_of_no_steps()
        self.flush()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # -- figures ------------------------------------------------------------------------------

    def drift(self) -> dict[str, float]:
        """Relative drift D of every weight matrix as it is now, by parameter name."""
        found: dict[str, float] = {}
        with products(full=True):
            for batch in self._batches:
                found.update(zip(batch.names, batch.measure().tolist(), strict=True))
        return found

    def _last_drifts(self) -> Tensor:
        """Relative drift of every weight matrix after the last projection, float64 [weights]."""
        if not self._batches:
            return torch.zeros(1, dtype=torch.float64, device=self._allowed.device)
        return torch.cat([batch.last_drift for batch in self._batches])

    def metrics(self) -> dict[str, float]:
        """Figures of the last projection, for a log."""
        drifts = self._last_drifts()
        tight = [batch.multiplier > 0 for batch in self._batches]
        figures = {
            "retention/drift_mean": float(drifts.mean()),
            "retention/drift_max": float(drifts.max()),
            "retention/layers_at_budget_frac": float(torch.cat(tight).double().mean())
            if tight
            else 0.0,
        }
        if self._budget is not None:
            figures.update(self._budget.figures())
        if self.eps is not None:
            figures["retention/eps"] = self.eps
        return figures

    @property
    def still(self) -> list[str]:
        """Names of the parameters that stay as a whole."""
        return self._still.names

    @property
    def free(self) -> list[str]:
        """Names of the parameters that no old task used: they train as if there were no guard."""
        held = {*self._still.names, *self.memory.layers, *self.memory.rows}
        return [name for name in parameter_names(self.model).values() if name not in held]

    @property
    def num_bytes(self) -> int:
        """Bytes the guard holds beside the model and the memory."""
        return self._still.num_bytes + sum(batch.num_bytes for batch in self._batches)

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Anchors, what is pending in the interval, and the step; the memory has its own state."""
        weights = {name: state.tensors() for name, state in self._states().items()}
        return {
            "steps": self.steps,
            "every": self.every,
            "eps": self.eps,
            "release": self.release,
            "budget": None if self._budget is None else self._budget.state_dict(),
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
        if (state["budget"] is None) != (self._budget is None):
            raise ValueError(
                f"drift (={self.budget}) must be controlled as in the checkpoint "
                f"(={state['budget']}); build the guard with the same drift."
            )
        self.steps, self.every = int(state["steps"]), state["every"]
        self.eps, self.release = state["eps"], state["release"]
        if self._budget is not None:
            self._budget.load_state_dict(state["budget"])
        self._still.load_state_dict(state["still"])
        states = {}
        for weight in self._weights:
            saved = state["weights"][weight.name]
            states[weight.name] = WeightState.restored(weight, saved)
        with products(full=True):
            states = {w.name: states[w.name].carried_over(w) for w in self._weights}
        self._arrange(states)
