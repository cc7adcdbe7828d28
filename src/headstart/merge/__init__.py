"""Several models into one, in weight space."""

from .average import Average as Average
from .ties import Ties as Ties
