"""DeepNestedOptimizer: AdamW on the clock of a continuum memory system, with nested parts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from cms_topology import Logger, StepReport, TopologyManager

from .._cms import ContinuumMemorySystem
from .._loggers import JsonLinesLogger
from ._classify import discover_block_sparse_layers, groups_of_model, groups_of_parameters
from ._controller import ControllerState, LearningRateController
from ._levels import adam_state, only_due_levels, restore_sums
from ._logging import topology_metrics
from ._meta_learner import MetaLearner, MetaReport, nested_networks
from ._momentum import DeepMomentum, DeepMomentumStep
from ._newborns import NewbornSteps
from ._report import OptimizerReport
from ._spikes import LossSpike, LossSpikeDetector
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
        self.cms = ContinuumMemorySystem() if cms is None else cms
        self.model: nn.Module | None = None
        if isinstance(params_or_model, nn.Module):
            self.model = params_or_model
            groups = groups_of_model(params_or_model, self.cms, weight_decay)
        elif isinstance(params_or_model, Tensor):
            raise TypeError(
                f"params_or_model (=Tensor {tuple(params_or_model.shape)}) must be a model or an "
                "iterable of parameters; put the tensor into a list."
            )
        else:
            groups = groups_of_parameters(params_or_model, self.cms)
        memory = DeepMomentum() if deep_momentum is True else deep_momentum or None
        control = LearningRateController() if controller is True else controller or None
        if memory is not None and (fused or capturable or amsgrad):
            name = "fused" if fused else "capturable" if capturable else "amsgrad"
            raise ValueError(
                f"{name} (=True) must be off with deep_momentum, which has a step of its own."
            )
        if control is not None and capturable:
            raise ValueError(
                "capturable (=True) must be off with controller, whose factors pass through the "
                "host; use fused=True for speed."
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
        self.last_report: OptimizerReport | None = None
        """What the last step did."""
        self.last_meta: MetaReport | None = None
        """What the last `meta_update` did."""
        self._newborns: NewbornSteps | None = None
        networks = nested_networks(self.deep_momentum, self.controller)
        self._meta = MetaLearner(networks, meta_lr) if networks else None
        self._attach_topology(topology)
        self._built = True
        self._choose_amp()

    def _attach_topology(self, topology: Mapping[str, Any] | bool) -> None:
        settings = dict(topology) if isinstance(topology, Mapping) else {}
        if self.model is None or not discover_block_sparse_layers(self.model):
            if settings:
                raise ValueError(
                    "topology (settings given) needs a model with CMSBlockLinear layers as "
                    "params_or_model; make some with cms_topology.sparsify(model)."
                )
            return
        if topology is False:
            return
        if "periods" in settings and tuple(settings["periods"]) != self.cms.periods:
            raise ValueError(
                f"topology['periods'] (={settings['periods']}) must be those of cms "
                f"(={self.cms.periods}): there is one clock; set them there."
            )
        # newborn steps are corrected here, where the age in updates of a slow level is known
        settings |= {"periods": self.cms.periods, "correct_newborn_steps": False}
        self.topology = TopologyManager(self.model, self, **settings)
        self._newborns = NewbornSteps(self.topology.layers, self.param_groups)

    def _choose_amp(self) -> None:
        # A fused AdamW takes the scaler's verdict on the device. Our other parts read gradients
        # themselves, so then the scaler has to unscale and judge before the step.
        plain = self.deep_momentum is None and self.controller is None and self.topology is None
        slow = any(group["period"] > 1 for group in self.param_groups)
        fused = any(group["fused"] for group in self.param_groups)
        self._step_supports_amp_scaling = bool(plain and fused and not slow)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may say its `level` (default 0) and `lr_scale`."""
        if self.deep_momentum is not None or self.controller is not None:
            raise ValueError(
                "param_group must be given to the constructor: deep_momentum and controller have "
                "one network part per group."
            )
        self._complete(param_group)
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
        self.last_report = self._finish(loss, topology)
        return self.last_report if closure is None else loss

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
            with self._scaled_rates():
                if self.deep_momentum is None:
                    _adamw_step(self)
                else:
                    self._deep_step()
                if self._newborns is not None:
                    self._newborns.correct(self, step)
        return loss

    def _deep_step(self) -> None:
        assert self.deep_momentum is not None
        for index, group in enumerate(self.param_groups):
            states = [adam_state(self, group, p) for p in group["params"] if p.grad is not None]
            self.deep_momentum.update(index, group, states)

    @contextmanager
    def _scaled_rates(self) -> Iterator[None]:
        """Inside, `lr` of the groups includes their factors."""
        rates = [group["lr"] for group in self.param_groups]
        factors = self.controller.factors if self.controller is not None else [1.0] * len(rates)
        try:
            for group, factor in zip(self.param_groups, factors, strict=True):
                if factor * group["lr_scale"] != 1.0:
                    group["lr"] = group["lr"] * (factor * group["lr_scale"])
            yield
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _finish(self, loss: Any, topology: StepReport | None) -> OptimizerReport:
        due = self.cms.due(self.global_step)
        found: tuple[LossSpike, ...] = ()
        if 1 in due:
            found = tuple(self.spikes.flush())
        if topology is not None and topology.swaps:
            self.spikes.decided(self.global_step)
        report = OptimizerReport(
            step=self.global_step,
            due_levels=due,
            loss=loss,
            topology=topology,
            lr_factors=tuple(self.controller.factors) if self.controller is not None else None,
            rolling_swap_rate=self.swap_rate if topology is not None and topology.swaps else None,
            spikes=found,
        )
        if self.logger is not None and 2 in due:
            self.logger.log(topology_metrics(self, report), self.global_step)
        return report

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
