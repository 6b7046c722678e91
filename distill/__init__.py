"""The healing: stages of training that teach a converted model to work as it did before."""

from .conversion import ConversionResult, run_conversion
from .embedded import embedded_model_path, embedded_tokens
from .progress import Progress, Silent, TerminalProgress

__all__ = [
    "ConversionResult",
    "Progress",
    "Silent",
    "TerminalProgress",
    "embedded_model_path",
    "embedded_tokens",
    "run_conversion",
]
