"""The methods by name, and the way a command line asks for them."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

from ._ablations import (
    EveryStep,
    GrownAtRandom,
    GrownSwapping,
    Influence,
    OpenLoop,
    Swapping,
    SwappingUncompensated,
    SwappingUnpriced,
)
from ._anchored import EWC, L2
from ._kronecker import KroneckerEWC
from ._method import Method
from ._plain import FineTuning, LowRate
from ._projection import (
    DampedProjection,
    DenseProjection,
    FixedEps,
    GrowingProjection,
    Projection,
    RecallingProjection,
    RehearsingProjection,
    ReleasingProjection,
)
from ._rehearsal import Joint, RealRehearsal, SelfRehearsal
from ._topological import FreezeAndGrow, RigL

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FineTuning,
        LowRate,
        L2,
        EWC,
        KroneckerEWC,
        DenseProjection,
        FreezeAndGrow,
        RigL,
        SelfRehearsal,
        RealRehearsal,
        Joint,
        Projection,
        GrowingProjection,
        DampedProjection,
        RehearsingProjection,
        RecallingProjection,
        ReleasingProjection,
        FixedEps,
        OpenLoop,
        EveryStep,
        Influence,
        GrownAtRandom,
        Swapping,
        GrownSwapping,
        SwappingUncompensated,
        SwappingUnpriced,
    )
}
"""Every method of the protocol."""

ARCHES = ("sparse", "spare", "dense", "narrow")
"""Block-sparse; block-sparse with capacity left free; dense of equal width; dense of equal size."""

_SHOWN = ("fine-tuning", "joint", "ours", "ours-grown", "ours-damped", "ours-releasing")
_OTHERS = textwrap.fill(
    ", ".join(name for name in METHODS if name not in _SHOWN),
    78,
    initial_indent="  others: ",
    subsequent_indent="          ",
    break_on_hyphens=False,
)
METHOD_HELP = f"""\
methods, each as NAME[@ARCH][:RATE,...][=DIAL,...]:
  fine-tuning     plain training; its dial is the learning rate
  joint           old data beside the new at every step: the upper bound
  ours, ours-grown, ours-damped
                  a trust region, for tasks in other symbols than the old ones
  ours-releasing  rehearses what the model wrote: for tasks in the same symbols,
                  text after text, many tasks
{_OTHERS}
  ARCH            {", ".join(ARCHES)}: block-sparse, with capacity left
                  free to grow into, dense of equal width, dense of equal size
  RATE            learning rate of the tasks after the first
  DIAL            strength; "sweep" tries all decades, "auto" is the method's"""


class Asked(NamedTuple):
    """A method, an architecture, one value of the dial and one learning rate."""

    method: str
    arch: str
    dial: float | None
    rate: float | None = None
    """Of the tasks after the first; None: the setting's."""

    def make(self) -> Method:
        """The method with its dial and rate.

        Raises:
            ValueError: a dial that the method does not take.
        """
        method = METHODS[self.method](self.dial)
        method.rate = self.rate
        return method


def parse_methods(texts: list[str]) -> list[Asked]:
    """Requests such as "ours", "ours:2e-3,4e-3=0.01", "fine-tuning@dense=1e-3" as single cells.

    Raises:
        ValueError: an unknown method or architecture, a dial or rate that is no number, or a rate
            for a method whose dial is the rate.
    """
    asked = []
    for text in texts:
        head, _, dials = text.partition("=")
        head, _, rates = head.partition(":")
        name, _, arch = head.partition("@")
        if name not in METHODS:
            raise ValueError(f"method (={name!r}) must be one of {', '.join(METHODS)}.")
        arch = arch or METHODS[name].arch
        if arch not in ARCHES:
            raise ValueError(f"architecture (={arch!r}) must be one of {', '.join(ARCHES)}.")
        asked += [
            Asked(name, arch, dial, rate)
            for rate in _rates(name, rates)
            for dial in _dials(name, dials)
        ]
    return list(dict.fromkeys(asked))


def _rates(name: str, text: str) -> tuple[float | None, ...]:
    if not text:
        return (None,)
    if METHODS[name].dial_name == "lr":
        raise ValueError(
            f"learning rate (={text!r}) of method {name} is its dial; write {name}={text}."
        )
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"learning rate (={text!r}) of method {name} must be a number.") from error


def _dials(name: str, text: str) -> tuple[float | None, ...]:
    if text == "sweep":
        return METHODS[name].dials or (None,)
    values: list[float | None] = []
    for part in text.split(","):
        try:
            values.append(None if part in ("", "auto") else float(part))
        except ValueError as error:
            raise ValueError(
                f'dial (={part!r}) of method {name} must be a number, "sweep" or "auto".'
            ) from error
    return tuple(values)
