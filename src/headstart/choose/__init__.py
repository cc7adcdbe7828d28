"""Which model to start from: scores of what a model already knows of the target."""

from .ensemble_leep import ELEEP as ELEEP
from .ensemble_leep import MSLEEP as MSLEEP
from .gbc import GBC as GBC
from .hscore import HScore as HScore
from .knn import KNN as KNN
from .leep import LEEP as LEEP
from .linear_probe import LinearProbe as LinearProbe
from .logme import LogME as LogME
from .mbtl import MBTL as MBTL
from .mpts import MPTS as MPTS
from .nce import NCE as NCE
from .nleep import NLEEP as NLEEP
from .osborn import Osborn as Osborn
from .panda import PANDA as PANDA
from .parc import PARC as PARC
from .path_pkt import MoEPKT as MoEPKT
from .ped import PED as PED
from .sfda import SFDA as SFDA
from .tmi import TMI as TMI
from .transfer_score import TransferScore as TransferScore
from .transrate import TransRate as TransRate
