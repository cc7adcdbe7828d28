"""Train models that small changes of their inputs do not fool."""

from .adversarial_training import AdversarialTraining as AdversarialTraining
from .dverge import DVERGE as DVERGE
from .ensemble import Ensemble as Ensemble
from .robust_crop_selection import RICS as RICS
from .robust_crop_selection import select_crop as select_crop
from .vulnerability import distilled as distilled
from .vulnerability import diversity as diversity
from .vulnerability import transfer as transfer
