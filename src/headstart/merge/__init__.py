"""Several models into one, in weight space."""

from .average import Average as Average
from .barrier import Connectivity as Connectivity
from .barrier import connectivity as connectivity
from .batchnorm import restored_batchnorm as restored_batchnorm
from .clp_transfer import clp_embeddings as clp_embeddings
from .clp_transfer import clp_transfer as clp_transfer
from .finetuning_transfer import DiffTransfer as DiffTransfer
from .finetuning_transfer import apply_diff as apply_diff
from .finetuning_transfer import diff_vector as diff_vector
from .finetuning_transfer import recycle as recycle
from .padding import Padded as Padded
from .robust_weight_signatures import Patched as Patched
from .robust_weight_signatures import extract_signature as extract_signature
from .robust_weight_signatures import patch as patch
from .signature_profile import first_layers as first_layers
from .signature_profile import layer_profile as layer_profile
from .signature_profile import signature_cosine as signature_cosine
from .signature_storage import quantise as quantise
from .strength import choose_alpha as choose_alpha
from .ties import Ties as Ties
from .transfer_report import transfer_report as transfer_report
