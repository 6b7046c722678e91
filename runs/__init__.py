"""A whole run from a recipe to a saved model: open, plan, swap, heal, measure, save; and go on where it was cut off."""

from .conversion import ConversionResult, run_conversion
from .packaged_model import embedded_model_path, embedded_tokens

__all__ = ["ConversionResult", "embedded_model_path", "embedded_tokens", "run_conversion"]
