"""Carry a language model to another language: its vocabulary, its training text, its instructions."""

from .bits import TextFigures as TextFigures
from .bits import code_switching_rate as code_switching_rate
from .bits import fertility as fertility
from .bits import language_report as language_report
from .bits import resegmented as resegmented
from .bits import windows as windows
from .extension import extend_model as extend_model
from .llama_beyond_english import NextToken as NextToken
from .llama_beyond_english import Pretrained as Pretrained
from .llama_beyond_english import continue_pretraining as continue_pretraining
from .llama_beyond_english import instructions as instructions
from .mixing import Mixed as Mixed
from .segmentation import extend_tokenizer as extend_tokenizer
