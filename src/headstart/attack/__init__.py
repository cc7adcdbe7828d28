"""Perturbations that transfer between models, as a measure of robustness."""

from .ensemble import fused as fused
from .mifgsm import MIFGSM as MIFGSM
