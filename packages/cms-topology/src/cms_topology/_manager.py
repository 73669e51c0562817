"""TopologyManager: runs the topology of any model under any optimizer."""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockell_format.snapshots import LayerInfo, LayerSnapshot, SnapshotWriter
from cms_topology import _distributed as dist_sync
from cms_topology import _optimizers as optimizers
from cms_topology._accumulate import accumulate_scores, refuse_foreign_values
from cms_topology._averaged import averaged_layers, restart_averages
from cms_topology._birth import reset_optimizer_states
from cms_topology._clock import CMSClock
from cms_topology._convert import sparse_layers
from cms_topology._decision import decide_all, unchanged
from cms_topology._keeper import RecordKeeper
from cms_topology._linear import CMSBlockLinear
from cms_topology._newborn_steps import NewbornStepCorrection
from cms_topology._participation import Participation
from cms_topology._records import decision_metrics, digests, layer_snapshot, swap_rate
from cms_topology._result import TopologyDecisionResult, count_swaps
from cms_topology._retention._bank import BlockBank
from cms_topology._retention._consolidation import Consolidation
from cms_topology._retention._topology import RetentionRule
from cms_topology._sampled import fold_sampled_steps
from cms_topology._scores import swap_rates
from cms_topology._seeding import decision_generator
from cms_topology._step_kernels import StepKernels, values_and_ages


class Logger(Protocol):
    """Anything that takes metrics: `blockell_format.snapshots.SnapshotWriter` does."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take numbers by name, of one optimizer step."""


@dataclass(frozen=True)
class StepReport:
    """What one call of `TopologyManager.step` did."""

    step: int
    """Optimizer steps so far, this one included."""
    due_levels: tuple[int, ...]
    """Levels of the clock that were due: 0 accumulate, 1 score, 2 decide."""
    sampled: bool
    """Whether this step's backward pass collected statistics of absent blocks."""
    overhead_s: float
    """Seconds of host time spent in the call."""
    swaps: dict[str, TopologyDecisionResult] = field(default_factory=dict)
    """Per layer, the outcome of the decision; empty when none was due."""

    @property
    def swap_rate(self) -> float | None:
        """Share of all live blocks that were swapped; None when no decision was due."""
        return swap_rate(self.swaps) if self.swaps else None


class TopologyManager:
    """Finds the sparse layers of a model and runs their clock.

    ```python
    manager = TopologyManager(model, optimizer)
    ...
    optimizer.step()
    manager.step()        # between optimizer.step() and optimizer.zero_grad()
    optimizer.zero_grad()
    ```

    Args:
        model: any module; wrapped by DDP or torch.compile or not.
        optimizer: the optimizer (or several) of the layers' `values`; its state of replaced blocks
            is reset. None if there is no such state. A new optimizer needs a new manager; what the
            old one's `state_dict` returned goes into that.
        periods: optimizer steps between two score accumulations (always 1), foldings and decisions.
        seed: of exploration and new weights; the same on every rank.
        sample_steps: how many steps before each decision collect statistics of absent blocks.
            Default: 1 for exact gradient norms, 10 for the outer product (at most `periods[1]`), 8
            for scores in nats.
        freeze_after: no more decisions after this step; None decides for ever.
        correct_newborn_steps: see `NewbornStepCorrection`.
        writer: records a snapshot at every decision (rank 0 only). If it cannot be written, as on a
            full disk, that is warned of and training goes on: see `RecordKeeper`.
        logger: receives swap rate and column entropy at every decision (rank 0 only); the same.
        retention: what is kept of earlier tasks; see `retain`.
        drop_cost: under retention, nats per token that dropping a block (all of its row group) may
            cost the earlier tasks; 0 locks every block they had.
        compensate: under retention, let the other blocks of a row absorb, by least squares on the
            earlier tasks' inputs, what a dropped block did.
        bank: keeps dropped blocks.
        averages: a model that averages this one's weights (or several), such as
            `torch.optim.swa_utils.AveragedModel`: its averages of replaced blocks start afresh.
        process_group: the ranks that train the same layers and decide together; every one of them
            has to call `step`. Default: DistributedDataParallel's, or all ranks.

    A layer that is frozen, in none of the optimizers given, or got no gradient since the last
    decision, keeps its blocks; so does one that ran in evaluation mode in the steps that collect
    statistics of absent blocks.

    Raises:
        ValueError: the model has no `CMSBlockLinear`, two of them share their `values`, these are
            sharded, the optimizer trains none of them, or a setting is outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
        *,
        periods: Sequence[int] = (1, 10, 100),
        seed: int = 0,
        sample_steps: int | None = None,
        freeze_after: int | None = None,
        correct_newborn_steps: bool = True,
        writer: SnapshotWriter | None = None,
        logger: Logger | None = None,
        retention: Consolidation | None = None,
        drop_cost: float = 0.0,
        compensate: bool = True,
        bank: BlockBank | None = None,
        averages: nn.Module | Iterable[nn.Module] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.layers = sparse_layers(model)
        if not self.layers:
            raise ValueError(
                f"model (={type(model).__name__}) has no CMSBlockLinear layer; "
                "make some with cms_topology.sparsify(model)."
            )
        _refuse_shared_values(self.layers)
        for layer in self.layers.values():
            refuse_foreign_values(layer)
        wrapped = optimizers.listed(optimizer)
        self._optimizers = [optimizers.unwrapped(one) for one in wrapped]
        # only these can tell that a step was none
        self._wrappers = [one for one in wrapped if hasattr(one, "gradient_state")]
        values = [layer.values for layer in self.layers.values()]
        optimizers.refuse_strangers(self._optimizers, model, values)
        self.clock = CMSClock(periods)  # type: ignore[arg-type]
        if self.clock.periods[0] != 1:
            raise ValueError(
                f"periods[0] (={self.clock.periods[0]}) must be 1: scores and block ages count "
                "every optimizer step."
            )
        if sample_steps is not None and not 1 <= sample_steps <= self.clock.periods[2]:
            raise ValueError(
                f"sample_steps (={sample_steps}) must be between 1 and the decision period "
                f"(={self.clock.periods[2]})."
            )
        for name, given, method in (("writer", writer, "write"), ("logger", logger, "log")):
            if given is not None and not hasattr(given, method):
                raise ValueError(f"{name} (={type(given).__name__}) must have a method {method}.")
        self.seed = operator.index(seed)
        self.writer, self.logger, self._keeper = writer, logger, RecordKeeper()
        self._model: nn.Module | None = model
        self._group = process_group or dist_sync.group_of(model)
        self.freeze_after = freeze_after
        self.overhead_seconds = 0.0
        """Host seconds spent in `step` so far."""
        self._sample_steps = sample_steps
        self._longest = 10 if sample_steps is None else sample_steps  # that any layer samples
        if not drop_cost >= 0:
            raise ValueError(f"drop_cost (={drop_cost}) must be 0 nats or more.")
        self._drop_cost, self._compensate, self.bank = drop_cost, compensate, bank
        self.retain(retention)
        self._correction = NewbornStepCorrection() if correct_newborn_steps else None
        averages = (averages,) if isinstance(averages, nn.Module) else averages
        self._averages = [averaged_layers(averaged, self.layers) for averaged in averages]
        self._kernels: StepKernels | None = None
        self._participation = Participation(self.layers, self._optimizers)
        self._step = 0
        self._warned_no_grad = self._warned_apart = self._looked_for_zeros = False
        self._token, self._stepped, self._warned_turns = object(), False, False
        for layer in self.layers.values():
            if layer._clock is None:
                layer._clock = self._token
        self._arm_sampling()

    def retain(self, memory: Consolidation | None) -> None:
        """Respect what `memory` keeps from now on, in place of what was respected before.

        Blocks of the consolidated tasks are locked, or dropped only for a price and compensated
        for; newborn blocks start at zero, so that no output changes at their birth.
        """
        known = {} if memory is None else memory.layers
        self._rules = {
            name: RetentionRule(
                name,
                known[f"{name}.values" if name != "layer" else "values"],
                drop_cost=self._drop_cost,
                compensate=self._compensate,
                bank=self.bank,
            )
            for name in self.layers
            if (f"{name}.values" if name != "layer" else "values") in known
        }

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        return self._step

    @property
    def swap_rate(self) -> float | None:
        """Mean share of blocks swapped per decision over the last ten; None before the first."""
        total = sum(layer.R * layer.num_live for layer in self.layers.values())
        found = swap_rates([layer.scorer for layer in self.layers.values()])
        rates = {name: r[-10:] for name, r in zip(self.layers, found, strict=True)}
        counts = [sum(r) / len(r) * self._blocks(name) for name, r in rates.items() if r]
        return sum(counts) / total if counts else None

    # -- the clock ----------------------------------------------------------------------------

    def step(self) -> StepReport:
        """Advance by one optimizer step; call it after `optimizer.step()`, before `zero_grad()`.

        While Accelerate accumulates gradients its optimizer does not step, and neither does this.

        Raises:
            TopologyDivergenceError: the ranks hold different topologies after a decision.
        """
        started = time.perf_counter()
        if any(map(optimizers.accumulates, self._wrappers)):
            return StepReport(self._step, (), False, time.perf_counter() - started)
        self._step += 1
        due = self.clock.due(self._step)
        sampled = any(layer.collect_candidates for layer in self.layers.values())
        layers = list(self.layers.values())
        self._notice_other_clock(layers)
        self._participation.note(sampled)
        if 0 in due:
            if self._accumulate(layers) is None:
                self._warn_no_grad()
            elif self._correction is not None:
                self._correct_newborns()
        if 1 in due:
            fold_sampled_steps([layer.scorer for layer in layers])
        swaps: dict[str, TopologyDecisionResult] = {}
        if 2 in due and not self._frozen(self._step):
            swaps = self._decide()
        self._arm_sampling()
        spent = time.perf_counter() - started
        self.overhead_seconds += spent
        return StepReport(self._step, due, sampled, spent, swaps)

    def _notice_other_clock(self, layers: list[CMSBlockLinear]) -> None:
        """Warn, once, if another manager counts some of these layers' steps in turns with this."""
        taken = [layer for layer in layers if layer._clock is not self._token]
        if taken:
            in_turns = self._stepped and any(layer._clock is not None for layer in taken)
            if in_turns and not self._warned_turns:
                self._warned_turns = True
                warnings.warn(
                    "two TopologyManagers step the same layers in turns, so every step is counted "
                    "and every decision made twice; keep one of them.",
                    stacklevel=3,
                )
            for layer in taken:
                layer._clock = self._token
        self._stepped = True

    def _accumulate(self, layers: list[CMSBlockLinear]) -> Tensor | None:
        """`accumulate_scores`, by the short way where there is one."""
        if self._kernels is None or not self._kernels.holds():
            self._kernels = StepKernels(layers)
        with torch.no_grad():
            finite = self._kernels.accumulate()
        return accumulate_scores(layers) if finite is None else finite

    def _correct_newborns(self) -> None:
        assert self._correction is not None
        layers = values_and_ages(self.layers.values())
        for optimizer in self._optimizers:
            self._correction.apply_all(optimizer, layers)

    def _decide(self) -> dict[str, TopologyDecisionResult]:
        dist_sync.refuse_join(self._model)
        self._sync()
        self._look_for_zeros()
        if self._model is not None:
            self._participation.look_for_others(self._model)
        taking_part = self._participation.take(self._group)
        generators = {n: decision_generator(self.seed, self._step, n) for n in taking_part}
        rules = {n: rule for n, rule in self._rules.items() if n in taking_part}
        decided = decide_all(taking_part, generators, self._step, rules)
        reset_optimizer_states(
            map(optimizers.holding_state, self._optimizers),
            {self.layers[n].values: x.swapped for n, x in decided.items()},
        )
        for averaged in self._averages:
            restart_averages(averaged, self.layers, decided)
        swaps = {
            n: decided[n] if n in decided else unchanged(x, self._step)
            for n, x in self.layers.items()
        }
        recording = self.writer is not None or self.logger is not None
        if recording or dist_sync.world_size(self._group) > 1:
            self._record(swaps)
        return swaps

    def _record(self, swaps: dict[str, TopologyDecisionResult]) -> None:
        count_swaps(swaps.values())
        device = next(iter(self.layers.values())).col_indices.device
        mine = digests(self.layers, swaps)
        everyone = dist_sync.gather_checksums(mine, device, self._group)
        checksums = dict(zip(swaps, everyone, strict=True))
        if dist_sync.rank(self._group) == 0:
            if self.logger is not None:
                with self._keeper.writing("the topology's metrics", self._step):
                    self.logger.log(decision_metrics(self.layers, swaps), self._step)
            if self.writer is not None:
                with self._keeper.writing("the topology's snapshot", self._step):
                    self.writer.write(
                        self._step,
                        self.snapshot(swaps),
                        checksums=checksums,
                        swap_counts={name: result.num_swaps for name, result in swaps.items()},
                    )
        # after the record is on disk, so that the evidence survives
        dist_sync.raise_on_divergence(self._step, checksums)

    def _sync(self) -> None:
        """Average scores over the ranks, and notice whether the gradients had been averaged."""
        layers = list(self.layers.values())
        if dist_sync.world_size(self._group) == 1 or self._warned_apart:
            dist_sync.sync_topology_scores(layers, self._group)
            return
        mine = [layer.scorer.score_ema.clone() for layer in layers]
        dist_sync.sync_topology_scores(layers, self._group)
        apart = dist_sync.scores_differ(mine, [layer.scorer.score_ema for layer in layers])
        if apart:
            self._warned_apart = True
            names = list(self.layers)
            warnings.warn(
                f"the gradients of {[names[i] for i in apart]} differ between ranks, and so will "
                "their weights, though not their topology: average them, as "
                "DistributedDataParallel does, or pass the process_group that trains these layers.",
                stacklevel=4,
            )

    def _look_for_zeros(self) -> None:
        """Warn if no gradient was anything but zero so far; waits for the device once."""
        # in the first step a zero behind the layers, as some initialise it, is no mistake
        if self._looked_for_zeros or self._step == 1:
            return
        held = [(x.scorer.score_ema, x.scorer.score_weight) for x in self.layers.values()]
        device = held[0][0].device
        seen = [torch.stack([t.any().to(device) for t in part]) for part in zip(*held, strict=True)]
        scored, counted = torch.stack(seen).any(1).tolist()
        self._looked_for_zeros = counted  # not as long as all gradients have overflowed
        if counted and not scored:
            warnings.warn(
                "all gradients of all sparse layers have been zero so far, so nothing will be "
                "swapped; call TopologyManager.step before optimizer.zero_grad(set_to_none=False).",
                stacklevel=4,
            )

    def _frozen(self, step: int) -> bool:
        return self.freeze_after is not None and step > self.freeze_after

    def _arm_sampling(self) -> None:
        """Let the next backward pass collect statistics only if a decision is near."""
        coming = self._step + 1
        wait = self.clock.steps_to_decision(coming)
        if wait >= self._longest and not any(x.collect_candidates for x in self.layers.values()):
            return
        frozen = self._frozen(coming + wait)
        for layer in self.layers.values():
            wanted = not frozen and wait < self._samples(layer)
            if layer.collect_candidates != wanted:  # a module takes its time to set an attribute
                layer.collect_candidates = wanted

    def _samples(self, layer: CMSBlockLinear) -> int:
        if self._sample_steps is not None:
            return self._sample_steps
        if layer.scorer.config.candidate_score == "gradient":
            return 1
        if layer.scorer.config.candidate_score == "loss":
            return min(8, self.clock.periods[2])
        return min(10, self.clock.periods[1])

    def _blocks(self, name: str) -> int:
        return self.layers[name].R * self.layers[name].num_live

    def _warn_no_grad(self) -> None:
        if not self._warned_no_grad:
            self._warned_no_grad = True
            warnings.warn(
                "TopologyManager.step found no gradient in any sparse layer, so nothing was scored;"
                " call it after optimizer.step() and before optimizer.zero_grad().",
                stacklevel=3,
            )

    # -- records ------------------------------------------------------------------------------

    def layer_table(self) -> list[LayerInfo]:
        """The layers as a run's layer table, for `SnapshotWriter`."""
        return [
            LayerInfo(name=name, R=x.R, C=x.C, K=x.K, B=x.B, row_group=x.row_group)
            for name, x in self.layers.items()
        ]

    def snapshot(
        self, swaps: Mapping[str, TopologyDecisionResult] | None = None
    ) -> dict[str, LayerSnapshot]:
        """Topology, ages and scores of every layer, with what `swaps` (if any) changed."""
        result = swaps or {}
        return {n: layer_snapshot(layer, result.get(n)) for n, layer in self.layers.items()}

    def write_snapshot(self) -> None:
        """Record the present topology outside a decision, for example at the start of a run."""
        if self.writer is None or dist_sync.rank(self._group) != 0:
            return
        self.writer.write(
            self._step,
            self.snapshot(),
            checksums={name: [x.topology_checksum()] for name, x in self.layers.items()},
            swap_counts=dict.fromkeys(self.layers, 0),
        )

    # -- state --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy; what was looked up is looked up again."""
        return {**self.__dict__, "_kernels": None, "_model": None, "_wrappers": []}

    def state_dict(self) -> dict[str, Any]:
        """Step, seed and periods; scores and ages are in the model's own state_dict."""
        seen = {layer.values: name for name, layer in self.layers.items()}
        return {
            "step": self._step,
            "seed": self.seed,
            "periods": list(self.clock.periods),
            "corrected_steps": self._correction.state_dict(seen) if self._correction else {},
            **self._participation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: seed or periods differ from this manager's, or it is no such state.
        """
        if missing := {"step", "seed", "periods"} - set(state):
            raise ValueError(
                f"state (keys {sorted(state)}) must be what state_dict() returned; it lacks "
                f"{sorted(missing)}."
            )
        for name, mine in (("seed", self.seed), ("periods", list(self.clock.periods))):
            found = list(state[name]) if name == "periods" else state[name]
            if found != mine:
                raise ValueError(
                    f"{name} (={mine}) differs from the checkpoint's (={found}): decisions "
                    f"would not continue as they began; build the manager with {name}={found}."
                )
        self._step = int(state["step"])
        self._participation.load_state_dict(state)
        if self._correction is not None:
            parameters: dict[str, Tensor] = {n: x.values for n, x in self.layers.items()}
            self._correction.load_state_dict(state.get("corrected_steps", {}), parameters)
        self._arm_sampling()


def _refuse_shared_values(layers: Mapping[str, CMSBlockLinear]) -> None:
    """Two layers would move the same tiles, each by its own columns."""
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        values = layer._parameters.get("values")
        first = name if values is None else owners.setdefault(id(values), name)
        if first != name:
            raise ValueError(
                f"the values of {name!r} and {first!r} are one parameter, whose tiles would have "
                "to be in two topologies; put the same CMSBlockLinear into both places instead."
            )
