"""Several models into one, in weight space."""

from .average import Average as Average
from .barrier import Connectivity as Connectivity
from .barrier import connectivity as connectivity
from .clp_transfer import clp_embeddings as clp_embeddings
from .clp_transfer import clp_transfer as clp_transfer
from .finetuning_transfer import DiffTransfer as DiffTransfer
from .finetuning_transfer import apply_diff as apply_diff
from .finetuning_transfer import diff_vector as diff_vector
from .finetuning_transfer import recycle as recycle
from .padding import Padded as Padded
from .ties import Ties as Ties
from .transfer_report import transfer_report as transfer_report
