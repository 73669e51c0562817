"""What a training phase did, and how far it is."""

import sys
from dataclasses import dataclass, field

import torch


@dataclass
class PhaseReport:
    """What training on one task (or mixture) did."""

    task: str
    """Name of the task."""
    steps: int
    """Optimizer steps."""
    seconds: float
    """Wall time of training; evaluations and checkpoints are not counted."""
    eval_seconds: float
    """Wall time of the evaluations in between."""
    topology_seconds: float
    """Host time that topology work took, part of ``seconds``."""
    tokens: int
    """Training tokens seen."""
    final_loss: float
    """Mean training loss of the last steps, in nats."""
    swap_rates: list[float] = field(default_factory=list)
    """Share of all live blocks swapped, per topology decision."""
    checkpoint_seconds: float = 0.0
    """Wall time of writing checkpoints in between."""
    peak_memory_bytes: int = 0
    """Most memory in use: of the CUDA device during the phase, else of the process so far."""

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second of ``seconds``, over all processes."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def topology_frac(self) -> float:
        """Share of ``seconds`` that topology work took on the host."""
        return self.topology_seconds / self.seconds if self.seconds else 0.0


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used: allocated on a CUDA device since its reset, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
