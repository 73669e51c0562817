"""CMSBlockLinear: a drop-in nn.Linear whose block topology changes while the network learns."""

from cms_topology._accumulate import accumulate_scores
from cms_topology._birth import reset_optimizer_state
from cms_topology._clock import CMSClock
from cms_topology._config import ScoringConfig
from cms_topology._convert import densify, sparse_layers, sparsify
from cms_topology._distributed import TopologyDivergenceError, sync_topology_scores
from cms_topology._graphed import GraphedBackward
from cms_topology._keeper import RecordKeeper
from cms_topology._linear import CMSBlockLinear
from cms_topology._manager import Logger, StepReport, TopologyManager
from cms_topology._mlp import block_sparse_mlp, mlp_is_fused
from cms_topology._newborn_steps import NewbornStepCorrection
from cms_topology._result import AgeHistogram, TopologyDecisionResult, TopologyStats
from cms_topology._retention import (
    Absorption,
    BankedBlock,
    BlockBank,
    Consolidation,
    Covariance,
    DriftController,
    LayerMemory,
    Probes,
    Rehearsal,
    RetentionGuard,
    absorb,
    changed_blocks,
    consolidate,
    grow_for_task,
    make_probes,
    removal_cost,
    sample_tokens,
    used_blocks,
    with_answers,
)
from cms_topology._scorer import (
    TopologyScorer,
    compute_column_entropy,
    compute_gradient_frobenius_norms,
)
from cms_topology._seeding import decision_generator
from cms_topology._selection import Selection, select_top_k
from cms_topology._shapes import resolve_row_group

__version__ = "0.1.0"

__all__ = [
    "Absorption",
    "AgeHistogram",
    "BankedBlock",
    "BlockBank",
    "CMSBlockLinear",
    "CMSClock",
    "Consolidation",
    "Covariance",
    "DriftController",
    "GraphedBackward",
    "LayerMemory",
    "Logger",
    "NewbornStepCorrection",
    "Probes",
    "RecordKeeper",
    "Rehearsal",
    "RetentionGuard",
    "ScoringConfig",
    "Selection",
    "StepReport",
    "TopologyDecisionResult",
    "TopologyDivergenceError",
    "TopologyManager",
    "TopologyScorer",
    "TopologyStats",
    "absorb",
    "accumulate_scores",
    "block_sparse_mlp",
    "changed_blocks",
    "compute_column_entropy",
    "compute_gradient_frobenius_norms",
    "consolidate",
    "decision_generator",
    "densify",
    "grow_for_task",
    "make_probes",
    "mlp_is_fused",
    "removal_cost",
    "reset_optimizer_state",
    "resolve_row_group",
    "sample_tokens",
    "select_top_k",
    "sparse_layers",
    "sparsify",
    "sync_topology_scores",
    "used_blocks",
    "with_answers",
]
