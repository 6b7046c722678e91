"""A whole run from a recipe to a saved model: open, plan, swap, heal, measure, save; and go on where it was cut off."""

from ..packaged.model import embedded_model_path, embedded_tokens
from .conversion import run_conversion
from .result import ConversionResult

__all__ = ["ConversionResult", "embedded_model_path", "embedded_tokens", "run_conversion"]
