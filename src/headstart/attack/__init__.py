"""Perturbations that transfer between models, as a measure of robustness."""

from .bnn_surrogate import BNNSurrogate as BNNSurrogate
from .csgld import CSGLD as CSGLD
from .ensemble import fused as fused
from .mifgsm import MIFGSM as MIFGSM
from .sgld import SGLD as SGLD
from .swag import SWAG as SWAG
