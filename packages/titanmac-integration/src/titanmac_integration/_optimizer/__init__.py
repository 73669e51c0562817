"""The optimizer: AdamW on the clock of a continuum memory system, and its nested parts."""

from ._classify import classify_parameters, discover_block_sparse_layers
from ._controller import LearningRateController
from ._meta_learner import MetaReport
from ._momentum import DeepMomentum
from ._optimizer import DeepNestedOptimizer
from ._report import OptimizerReport
from ._spikes import LossSpike, LossSpikeDetector

__all__ = [
    "DeepMomentum",
    "DeepNestedOptimizer",
    "LearningRateController",
    "LossSpike",
    "LossSpikeDetector",
    "MetaReport",
    "OptimizerReport",
    "classify_parameters",
    "discover_block_sparse_layers",
]
