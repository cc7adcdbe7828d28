"""Labels at the target: heads, tuning and adapters."""

from .adapter import Adapter as Adapter
from .lora import LoRA as LoRA
