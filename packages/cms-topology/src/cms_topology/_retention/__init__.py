"""Retention: what a model must remember of earlier tasks, and training that respects it."""

from cms_topology._retention._answers import with_answers
from cms_topology._retention._bank import BankedBlock, BlockBank
from cms_topology._retention._compensation import Absorption, absorb
from cms_topology._retention._consolidate import consolidate
from cms_topology._retention._consolidation import Consolidation, LayerMemory
from cms_topology._retention._controller import DriftController
from cms_topology._retention._covariance import Covariance
from cms_topology._retention._grow import grow_for_task
from cms_topology._retention._guard import RetentionGuard
from cms_topology._retention._masks import changed_blocks, used_blocks
from cms_topology._retention._probes import Probes, make_probes, sample_tokens
from cms_topology._retention._rehearsal import Rehearsal
from cms_topology._retention._topology import removal_cost

__all__ = [
    "Absorption",
    "BankedBlock",
    "BlockBank",
    "Consolidation",
    "Covariance",
    "DriftController",
    "LayerMemory",
    "Probes",
    "Rehearsal",
    "RetentionGuard",
    "absorb",
    "changed_blocks",
    "consolidate",
    "grow_for_task",
    "make_probes",
    "removal_cost",
    "sample_tokens",
    "used_blocks",
    "with_answers",
]
