"""Perturbations that transfer between models, as a measure of robustness."""

from .adaea import AdaEA as AdaEA
from .bmtc import BMTC as BMTC
from .bnn_surrogate import BNNSurrogate as BNNSurrogate
from .csgld import CSGLD as CSGLD
from .cwa import CWA as CWA
from .difgsm import DIFGSM as DIFGSM
from .dta import DTA as DTA
from .ensemble import fused as fused
from .fgsm import FGSM as FGSM
from .fusion import Fusion as Fusion
from .fusion import adaptive_weights as adaptive_weights
from .fusion import consensus as consensus
from .mifgsm import MIFGSM as MIFGSM
from .nifgsm import NIFGSM as NIFGSM
from .pgd import PGD as PGD
from .sgld import SGLD as SGLD
from .sifgsm import SIFGSM as SIFGSM
from .stack import stacked as stacked
from .swag import SWAG as SWAG
from .tifgsm import TIFGSM as TIFGSM
from .vit_ensemble import ViTEnsemble as ViTEnsemble
from .vit_search import find_copies as find_copies
from .vmifgsm import VMIFGSM as VMIFGSM
