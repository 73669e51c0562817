"""The TitanMAC transformer with block-sparse layers, training and continual-learning commands."""

from ._config._config import TitanMACConfig
from ._continual import ContinualResult, run_continual
from ._data._arithmetic import ArithmeticTask
from ._data._files import load_data
from ._data._prose import ProseTask
from ._data._records import QuestionTask
from ._data._registry import TASK_NAMES, make_task
from ._data._tasks import Batch, Mixture, Task
from ._data._text import TextTask
from ._data._tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, make_tokenizer
from ._layers._mlp import TitanMLP
from ._loggers import (
    JsonLinesLogger,
    MultiLogger,
    TensorBoardLogger,
    WandbLogger,
    make_logger,
)
from ._memory import MemoryState, NeuralMemory
from ._metrics import bits_per_byte, exact_match, relative_forgetting, sample_greedily
from ._model._checkpoint import load_checkpoint, save_checkpoint
from ._model._conversion import to_block_sparse, to_dense
from ._model._titanmac import TitanMAC, create_titanmac_model
from ._optimizer import (
    DeepMomentum,
    DeepNestedOptimizer,
    LearningRateController,
    LossSpike,
    LossSpikeDetector,
    MetaReport,
    OptimizerReport,
    classify_parameters,
    discover_block_sparse_layers,
)
from ._optimizer._cms import ContinuumMemorySystem
from ._state import ModelState
from ._training._callback import TrainerCallback
from ._training._checkpoint import CheckpointStore
from ._training._config import TrainingConfig
from ._training._report import PhaseReport
from ._training._trainer import NonFiniteLossError, Trainer, TrainingStopped

__version__ = "0.1.0"

__all__ = [
    "TASK_NAMES",
    "ArithmeticTask",
    "Batch",
    "ByteTokenizer",
    "CheckpointStore",
    "ContinualResult",
    "ContinuumMemorySystem",
    "DeepMomentum",
    "DeepNestedOptimizer",
    "HuggingFaceTokenizer",
    "JsonLinesLogger",
    "LearningRateController",
    "LossSpike",
    "LossSpikeDetector",
    "MemoryState",
    "MetaReport",
    "Mixture",
    "ModelState",
    "MultiLogger",
    "NeuralMemory",
    "NonFiniteLossError",
    "OptimizerReport",
    "PhaseReport",
    "ProseTask",
    "QuestionTask",
    "Task",
    "TensorBoardLogger",
    "TextTask",
    "TitanMAC",
    "TitanMACConfig",
    "TitanMLP",
    "Tokenizer",
    "Trainer",
    "TrainerCallback",
    "TrainingConfig",
    "TrainingStopped",
    "WandbLogger",
    "bits_per_byte",
    "classify_parameters",
    "create_titanmac_model",
    "discover_block_sparse_layers",
    "exact_match",
    "load_checkpoint",
    "load_data",
    "make_logger",
    "make_task",
    "make_tokenizer",
    "relative_forgetting",
    "run_continual",
    "sample_greedily",
    "save_checkpoint",
    "to_block_sparse",
    "to_dense",
]
