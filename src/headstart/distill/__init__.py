"""Teach a small model what larger ones know."""

from .soft_targets import SoftTargets as SoftTargets
