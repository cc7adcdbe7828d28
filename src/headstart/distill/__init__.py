"""Teach a small model what larger ones know."""

from .consistency import Consistency as Consistency
from .consistency import jensen_shannon as jensen_shannon
from .efficiently_robustify import Robustify as Robustify
from .efficiently_robustify import confidence as confidence
from .soft_targets import SoftTargets as SoftTargets
from .three_heads import HeadReport as HeadReport
from .three_heads import ThreeHeads as ThreeHeads
from .three_heads import calibrate as calibrate
from .three_heads import choose_head as choose_head
from .three_heads import head_report as head_report
