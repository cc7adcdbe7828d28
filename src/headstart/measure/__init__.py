"""Numbers about models and runs: how far they can be believed, and what makes them err."""

from .corruptions import CorruptionAccuracy as CorruptionAccuracy
from .corruptions import CorruptionError as CorruptionError
from .corruptions import accuracy_by_corruption as accuracy_by_corruption
from .corruptions import corrupt as corrupt
from .corruptions import corruption_error as corruption_error
