"""The continuum memory system: levels of parameters that change at their own frequency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from cms_topology import CMSClock

LevelRule = Mapping[str, int] | Callable[[str, Tensor], int]

# what wrappers of a whole model put in front of a name, and those of a part of it wherever that is:
# DistributedDataParallel, torch.compile, Fabric; torch.compile, activation checkpointing, FSDP
_WRAPPERS = ("module", "_orig_mod", "_forward_module")
_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class ContinuumMemorySystem:
    """Levels of parameters and the clock that says which of them are due.

    A parameter of level l changes only at the steps s, counted from 1, with
    `s % periods[l] == 0`, and then by the mean gradient of the `periods[l]` steps since its last
    change (Behrouz et al. 2025, "Nested Learning", section on the continuum memory system: the sum
    there; under an optimizer that ignores the gradient's scale, like Adam, the two agree). The same
    clock runs the topology: level 0 accumulates scores, level 1 folds them, level 2 decides.

    `DeepNestedOptimizer(model, cms=...)` applies it. The object itself is only the clock and the
    assignment; it allocates nothing.

    ```python
    cms = ContinuumMemorySystem((1, 10, 100), {"blocks.*.mlp.*": 1})
    cms.due(20)  # (0, 1)
    ```

    Args:
        periods: steps between two updates of each level, fastest first; each a multiple of the one
            before it.
        levels: which level a parameter belongs to. A mapping from patterns on parameter names
            (`fnmatch`, without what wrappers put into names; the first match wins) to
            levels, or a function `(name, parameter) -> level`. Parameters that no pattern names,
            and all of them by default, belong to level 0.
        lr_scales: factor on the learning rate of each level, at least 0. A slow level takes fewer
            steps of the same length; this is where to make them longer.

    Raises:
        ValueError: periods that do not nest, a level that does not exist, a bad factor.
    """

    def __init__(
        self,
        periods: Sequence[int] = (1, 10, 100),
        levels: LevelRule | None = None,
        *,
        lr_scales: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        self.clock = CMSClock(tuple(periods))  # type: ignore[arg-type]
        self.lr_scales = tuple(float(scale) for scale in lr_scales)
        if len(self.lr_scales) != len(self.periods) or not all(
            0 <= scale < float("inf") for scale in self.lr_scales
        ):
            raise ValueError(
                f"lr_scales (={tuple(lr_scales)}) must be {len(self.periods)} finite numbers of at "
                "least 0, one per level."
            )
        self._levels = levels
        if isinstance(levels, Mapping):
            for pattern, level in levels.items():
                self.check_level(level, f"levels[{pattern!r}]")
        elif levels is not None and not callable(levels):
            raise ValueError(
                f"levels (={levels!r}) must be a mapping from name patterns to levels or a "
                "function (name, parameter) -> level."
            )
        self._step = 0

    @property
    def periods(self) -> tuple[int, int, int]:
        """Steps between two updates of each level."""
        return self.clock.periods

    @property
    def global_step(self) -> int:
        """Steps so far."""
        return self._step

    def due(self, step: int) -> tuple[int, ...]:
        """Levels due at `step` (counted from 1), fastest first."""
        return self.clock.due(step)

    def step(self) -> tuple[int, ...]:
        """Advance by one step; returns the levels that are due at it."""
        self._step += 1
        return self.clock.due(self._step)

    # -- which parameter belongs where --------------------------------------------------------

    def level_of(self, name: str, parameter: Tensor) -> int:
        """Level of one parameter.

        Raises:
            ValueError: the function given as `levels` returned something that is no level.
        """
        return self._level(plain_name(name), parameter)

    def _level(self, name: str, parameter: Tensor) -> int:
        if self._levels is None:
            return 0
        if isinstance(self._levels, Mapping):
            for pattern, level in self._levels.items():
                if fnmatchcase(name, pattern):
                    return level
            return 0
        return self.check_level(self._levels(name, parameter), f"level of {name!r}")

    def assign(self, parameters: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        """Level of every parameter of a model, or of the (name, parameter) pairs given.

        Raises:
            ValueError: a pattern names no parameter; probably a typing error.
        """
        if isinstance(parameters, nn.Module):
            parameters = parameters.named_parameters()
        full = dict(parameters)
        named = {plain: full[name] for name, plain in plain_names(full).items()}
        if isinstance(self._levels, Mapping):
            for pattern in self._levels:
                if not any(fnmatchcase(name, pattern) for name in named):
                    some = ", ".join(list(named)[:4])
                    raise ValueError(
                        f"levels (pattern {pattern!r}) must name at least one parameter; the "
                        f"parameters are called {some}, ..."
                    )
        return {name: self._level(name, parameter) for name, parameter in named.items()}

    @property
    def assigns(self) -> bool:
        """Whether any parameter can be on another level than 0."""
        return self._levels is not None

    def check_level(self, level: Any, what: str) -> int:
        """`level` if it is one; `what` names it in the message of the ValueError."""
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < 3:
            raise ValueError(f"{what} (={level!r}) must be 0, 1 or 2, a level of {self.periods}.")
        return level

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Step and periods. The accumulated gradients are in the optimizer's own state."""
        return {"step": self._step, "periods": list(self.periods)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the periods differ from this object's.
        """
        if list(state["periods"]) != list(self.periods):
            raise ValueError(
                f"periods (={list(self.periods)}) differs from the checkpoint's "
                f"(={list(state['periods'])}): gradients half accumulated would be applied at the "
                f"wrong step; use periods={tuple(state['periods'])}."
            )
        self._step = int(state["step"])

    def __repr__(self) -> str:
        return f"ContinuumMemorySystem(periods={self.periods}, step={self._step})"


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    parts = name.split(".")
    while parts and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(part for part in parts if part not in _INNER)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name -> its plain one; names that would become the same stay as they are."""
    plain = {name: plain_name(name) for name in names}
    seen = Counter(plain.values())
    return {name: name if seen[short] > 1 else short for name, short in plain.items()}
