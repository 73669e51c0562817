"""The methods by name, and the way a command line asks for them."""

from __future__ import annotations

from typing import NamedTuple

from ._ablations import (
    EveryStep,
    GrownAtRandom,
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
    DenseProjection,
    FixedEps,
    GrowingProjection,
    Projection,
    RehearsingProjection,
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
        RehearsingProjection,
        FixedEps,
        OpenLoop,
        EveryStep,
        Influence,
        GrownAtRandom,
        Swapping,
        SwappingUncompensated,
        SwappingUnpriced,
    )
}
"""Every method of the protocol."""

ARCHES = ("sparse", "spare", "dense", "narrow")
"""Block-sparse; block-sparse with capacity left free; dense of equal width; dense of equal size."""

METHOD_HELP = (
    f"methods out of {', '.join(METHODS)}; NAME@ARCH runs one on another architecture "
    f"({', '.join(ARCHES)}), NAME=DIAL,DIAL sets its dial, NAME=sweep tries all its decades, "
    "NAME=auto leaves it to the method"
)


class Asked(NamedTuple):
    """A method, an architecture and one value of the dial."""

    method: str
    arch: str
    dial: float | None


def parse_methods(texts: list[str]) -> list[Asked]:
    """Requests such as "ours", "ewc=sweep", "fine-tuning@dense=1e-3,2e-3" as single cells.

    Raises:
        ValueError: an unknown method or architecture, or a dial that is no number.
    """
    asked = []
    for text in texts:
        head, _, dials = text.partition("=")
        name, _, arch = head.partition("@")
        if name not in METHODS:
            raise ValueError(f"method (={name!r}) must be one of {', '.join(METHODS)}.")
        arch = arch or METHODS[name].arch
        if arch not in ARCHES:
            raise ValueError(f"architecture (={arch!r}) must be one of {', '.join(ARCHES)}.")
        asked += [Asked(name, arch, dial) for dial in _dials(name, dials)]
    return list(dict.fromkeys(asked))


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
