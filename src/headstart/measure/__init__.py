"""Numbers about models and runs: how far they can be believed, and what makes them err."""

from .balance import balanced as balanced
from .corruptions import CorruptionAccuracy as CorruptionAccuracy
from .corruptions import CorruptionError as CorruptionError
from .corruptions import accuracy_by_corruption as accuracy_by_corruption
from .corruptions import corrupt as corrupt
from .corruptions import corruption_error as corruption_error
from .dumb import Condition as Condition
from .dumb import DumbStudy as DumbStudy
from .dumb import dumb_study as dumb_study
from .dumb import unguided as unguided
from .strength import similarity as similarity
from .strength import strongest as strongest
from .transfer_matrix import Prepared as Prepared
from .transfer_matrix import TransferMatrix as TransferMatrix
from .transfer_matrix import load_perturbed as load_perturbed
from .transfer_matrix import perturbed as perturbed
from .transfer_matrix import save_perturbed as save_perturbed
from .transfer_matrix import transfer_matrix as transfer_matrix
