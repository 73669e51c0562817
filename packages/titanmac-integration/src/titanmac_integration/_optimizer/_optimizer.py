"""DeepNestedOptimizer: AdamW on the clock of a continuum memory system, with nested parts."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from cms_topology import Logger, RecordKeeper, TopologyManager
from titanmac_integration._loggers import JsonLinesLogger

from ._arguments import (
    check_logger,
    check_parts,
    make_manager,
    nested_settings,
    parameter_groups,
    with_names,
)
from ._cms import ContinuumMemorySystem
from ._controller import ControllerState, LearningRateController
from ._levels import only_due_levels, restore_sums, scaled_rates
from ._logging import topology_metrics
from ._meta_learner import MetaLearner, MetaReport, nested_networks
from ._momentum import DeepMomentum, DeepMomentumStep
from ._newborns import NewbornSteps
from ._report import OptimizerReport, make_report
from ._spikes import LossSpikeDetector
from ._state import check_fits, load_nested_state, nested_state
from ._unroll import LossFunction

LossT = TypeVar("LossT")

# torch wraps `step` of every optimizer class it has seen to run hooks around it; the bare function
# is what runs inside our own hooks
_adamw_step = inspect.unwrap(torch.optim.AdamW.step)


class DeepNestedOptimizer(torch.optim.AdamW):
    """AdamW that runs the clock: slow parameters, the topology of sparse layers, nested learning.

    With nothing but its defaults it is `torch.optim.AdamW`, bit for bit, and drives the topology of
    the `CMSBlockLinear` layers of the model it is given. The nested parts (Behrouz et al. 2025,
    "Nested Learning") are options: slow levels (`cms`), deep momentum, a learning-rate controller,
    and meta-learning of the last two (`meta_update`).

    ```python
    optimizer = DeepNestedOptimizer(model, lr=3e-3)
    loss = model(tokens, labels)["loss"]
    loss.backward()
    report = optimizer.step()      # between backward() and zero_grad()
    optimizer.zero_grad()
    ```

    A model becomes groups by level and by weight decay, which applies to weight matrices only
    (`classify_parameters`). Anything else that torch's optimizers take is taken as it is: tensors,
    (name, tensor) pairs, groups; a group may say its `level`. Each group has, besides AdamW's keys,
    `level`, `period` and `lr_scale`, a factor on `lr` that schedulers do not touch.

    Step hooks run around the update of the parameters; the topology moves after them, so that a
    post hook which corrects the update never sees a block that was replaced.

    With gradient scaling a step that the scaler skips does not count: no clock advances.

    Args:
        params_or_model: a model, or parameters as `torch.optim.AdamW` takes them.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, fused: AdamW's.
        cms: levels of the parameters and the periods of the clock. Default: every parameter on
            level 0, periods (1, 10, 100).
        deep_momentum: True, or settings: a network in place of the moving average.
        controller: True, or settings: a learned factor on the learning rate of each group.
        topology: for a model with sparse layers: False leaves them alone, a mapping holds further
            arguments of `cms_topology.TopologyManager` (seed, writer, freeze_after, ...).
        logger: receives metrics of the topology and the nested parts at every level-2 step. A path
            stands for a file of JSON lines.
        spikes: how loss spikes at decisions are found; give the losses to `record_loss` or step
            with a closure.
        meta_lr: learning rate of `meta_update` (Adam).

    Raises:
        ValueError: an argument outside its range, or arguments that exclude each other.
    """

    def __init__(
        self,
        params_or_model: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        cms: ContinuumMemorySystem | None = None,
        deep_momentum: DeepMomentum | bool = False,
        controller: LearningRateController | bool = False,
        topology: Mapping[str, Any] | bool = True,
        logger: Logger | str | os.PathLike[str] | None = None,
        spikes: LossSpikeDetector | None = None,
        meta_lr: float = 1e-2,
    ) -> None:
        check_parts(
            cms=(cms, (ContinuumMemorySystem,), "ContinuumMemorySystem((1, 10, 100))"),
            deep_momentum=(deep_momentum, (DeepMomentum, bool), "True"),
            controller=(controller, (LearningRateController, bool), "True"),
            spikes=(spikes, (LossSpikeDetector,), "LossSpikeDetector(factor=3.0)"),
            topology=(topology, (Mapping, bool), '{"seed": 1}'),
        )
        check_logger(logger)
        self.cms = ContinuumMemorySystem() if cms is None else copy.copy(cms)
        """Clock and levels: a copy of what was given, so that two optimizers count apart."""
        self.model = params_or_model if isinstance(params_or_model, nn.Module) else None
        groups = parameter_groups(params_or_model, self.cms, weight_decay)
        memory, control = nested_settings(
            deep_momentum, controller, fused=fused, capturable=capturable, amsgrad=amsgrad
        )
        if not meta_lr > 0:
            raise ValueError(f"meta_lr (={meta_lr}) must be above 0.")
        self._built = False
        self.deep_momentum: DeepMomentumStep | None = None
        """Deep momentum's networks; None when it is off."""
        self.controller: ControllerState | None = None
        """The controller's network and factors; None when it is off."""
        self.topology: TopologyManager | None = None
        """The manager of the model's sparse layers; None when there are none."""
        super().__init__(
            groups,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        if memory is not None:
            self.deep_momentum = DeepMomentumStep(memory, self.param_groups)
        if control is not None:
            self.controller = ControllerState(control, self.param_groups)
        self.spikes = LossSpikeDetector() if spikes is None else spikes
        """Loss spikes at decisions so far."""
        self.logger: Logger | None = (
            JsonLinesLogger(logger) if isinstance(logger, (str, os.PathLike)) else logger
        )
        self._keeper = RecordKeeper()
        self.last_report: OptimizerReport | None = None
        """What the last step did."""
        self.last_meta: MetaReport | None = None
        """What the last `meta_update` did."""
        networks = nested_networks(self.deep_momentum, self.controller)
        self._meta = MetaLearner(networks, meta_lr) if networks else None
        self.topology = make_manager(self, topology)
        self._newborns = (
            NewbornSteps(self.topology.layers, self.param_groups) if self.topology else None
        )
        self._built = True
        self._choose_amp()

    def _choose_amp(self) -> None:
        # A fused AdamW takes the scaler's verdict on the device. Our other parts read gradients
        # themselves, so then the scaler has to unscale and judge before the step.
        plain = self.deep_momentum is None and self.controller is None and self.topology is None
        slow = any(group["period"] > 1 for group in self.param_groups)
        fused = any(group["fused"] for group in self.param_groups)
        self._step_supports_amp_scaling = bool(plain and fused and not slow)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may say its `level` (default 0) and `lr_scale`.

        Beside parameters with names, those of a model, ones without are called by their position.
        """
        if self.deep_momentum is not None or self.controller is not None:
            raise ValueError(
                "param_group must be given to the constructor: deep_momentum and controller have "
                "one network part per group."
            )
        self._complete(param_group)
        if self._built and "param_names" in self.param_groups[0]:
            # torch takes either all parameters with names or none
            param_group["params"] = with_names(param_group["params"], len(self.param_groups))
        super().add_param_group(param_group)
        if self._built:
            self._choose_amp()

    # -- the step -----------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Steps so far."""
        return self.cms.global_step

    @property
    def swap_rate(self) -> float | None:
        """Mean share of blocks swapped per decision over the last ten; None before the first."""
        return self.topology.swap_rate if self.topology is not None else None

    def record_loss(self, loss: Tensor | float) -> None:
        """Tell the spike detector the loss whose gradient the coming step uses.

        A tensor is kept and read later, together with others, so nothing waits for a device.
        """
        self.spikes.record(self.global_step + 1, loss)

    @overload  # type: ignore[override]
    def step(self, closure: None = None) -> OptimizerReport: ...

    @overload
    def step(self, closure: Callable[[], LossT]) -> LossT: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Advance by one step; call it between `backward()` and `zero_grad()`.

        Args:
            closure: clears the gradients, computes the loss and its gradients, returns the loss.

        Returns:
            A report of what happened; with a closure its loss instead, as all of torch's optimizers
            do (the report is then in `last_report`).

        Raises:
            TopologyDivergenceError: the ranks hold different topologies after a decision.
        """
        loss = self._update(closure)
        if closure is not None and isinstance(loss, (Tensor, float)):
            self.spikes.record(self.global_step, loss)
        topology = self.topology.step() if self.topology is not None else None
        self.last_report = report = make_report(self, loss, topology)
        if self.logger is not None and 2 in report.due_levels:
            with self._keeper.writing("what the optimizer logs", report.step):
                self.logger.log(topology_metrics(self, report), report.step)
        return report if closure is None else loss

    # torch would run the hooks around all of `step`, the change of the topology included
    step.hooked = True  # type: ignore[attr-defined]

    @torch.optim.Optimizer.profile_hook_step
    def _update(self, closure: Callable[[], Any] | None) -> Any:
        """Everything that moves parameters; step hooks run around it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.cms.step()
        step = self.global_step
        with torch.no_grad(), only_due_levels(self, step):
            if self.controller is not None and step % self.controller.config.period == 0:
                self.controller.update(self.param_groups, self.state)
            factors = self.controller.factors if self.controller is not None else None
            with scaled_rates(self.param_groups, factors):
                if self.deep_momentum is None:
                    _adamw_step(self)
                else:
                    self.deep_momentum.step(self)
                if self._newborns is not None:
                    self._newborns.correct(self, step)
        return loss

    # -- meta-learning ------------------------------------------------------------------------

    def meta_update(
        self,
        val_batch: Any,
        train_batches: Sequence[Any],
        *,
        loss_fn: LossFunction | None = None,
        second_order: bool = True,
    ) -> MetaReport:
        """Improve deep momentum and controller by the validation loss after unrolled steps.

        Takes k = len(train_batches) steps on a copy of the parameters, differentiably, and one Adam
        step of the nested networks along the gradient of the validation loss that follows. The
        model, its gradients and the optimizer's state are not changed.

        Args:
            val_batch: data of the loss to lower.
            train_batches: data of the unrolled steps, one batch each.
            loss_fn: `(model, batch) -> scalar loss`. Default: `model(**batch)` or `model(*batch)`,
                its "loss" if it returns a mapping.
            second_order: see the cost: exact gradients need about three times the time and keep
                all k graphs; False ignores how the training gradients depend on the networks.

        Raises:
            ValueError: neither deep momentum nor controller is on, there is no training batch, or
                the optimizer was made from parameters instead of a model.
        """
        if self._meta is None:
            raise ValueError(
                "meta_update (deep_momentum and controller off) needs a network to train; switch "
                "one of them on."
            )
        self.last_meta = self._meta.update(
            self, val_batch, train_batches, loss_fn=loss_fn, second_order=second_order
        )
        return self.last_meta

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and under "nested" the clock, the nested parts and the topology's clock.

        Complete between any two steps, also between two updates of a slow level. Scores and ages of
        the blocks are in the model's own state_dict. Tensors, numbers, strings and None only.
        """
        state = super().state_dict()
        state["nested"] = nested_state(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; load the model's state first.

        The state of a plain `torch.optim.AdamW` is taken, too: the clock then starts at its step.

        Raises:
            ValueError: other groups, periods or nested parts than this optimizer's.
        """
        nested = state_dict.get("nested")
        if nested is not None:
            check_fits(self, nested, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        restore_sums(self, state_dict)
        for group in self.param_groups:
            self._complete(group)
        if nested is not None:
            load_nested_state(self, nested)
        else:
            steps = [float(state["step"]) for state in self.state.values() if "step" in state]
            self.cms.load_state_dict({**self.cms.state_dict(), "step": max(steps, default=0)})

    def _complete(self, group: dict[str, Any]) -> None:
        """Fill in the keys that a plain AdamW's groups lack."""
        level = group.setdefault("level", 0)
        self.cms.check_level(level, "level of a parameter group")
        group.setdefault("lr_scale", self.cms.lr_scales[level])
        group["period"] = self.cms.periods[level]

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. A logger stays behind: two writers of one file would mix."""
        state = {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_")}
        del state["_zero_grad_profile_name"]
        return {**state, "logger": None, "last_report": None}
