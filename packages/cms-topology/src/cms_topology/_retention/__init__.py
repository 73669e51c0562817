"""Retention: what a model must remember of earlier tasks, and training that respects it."""

from cms_topology._retention._consolidate import consolidate
from cms_topology._retention._consolidation import Consolidation, LayerMemory
from cms_topology._retention._covariance import Covariance
from cms_topology._retention._guard import RetentionGuard

__all__ = ["Consolidation", "Covariance", "LayerMemory", "RetentionGuard", "consolidate"]
