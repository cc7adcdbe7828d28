"""Perturbations that transfer between models, as a measure of robustness."""

from .bmtc import BMTC as BMTC
from .bnn_surrogate import BNNSurrogate as BNNSurrogate
from .csgld import CSGLD as CSGLD
from .difgsm import DIFGSM as DIFGSM
from .ensemble import fused as fused
from .fgsm import FGSM as FGSM
from .mifgsm import MIFGSM as MIFGSM
from .nifgsm import NIFGSM as NIFGSM
from .pgd import PGD as PGD
from .sgld import SGLD as SGLD
from .sifgsm import SIFGSM as SIFGSM
from .stack import stacked as stacked
from .swag import SWAG as SWAG
from .tifgsm import TIFGSM as TIFGSM
from .vmifgsm import VMIFGSM as VMIFGSM
