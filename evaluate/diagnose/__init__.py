"""What the attention heads of a model look at, and what their layers could become."""

from .advice import LayerAdvice, advice_yaml, recommend
from .diagnose import diagnose_model
from .plots import plot_diagnosis
from .profiles import Diagnosis, HeadProfile, LayerProfile, SkippedLayer

__all__ = [
    "Diagnosis",
    "HeadProfile",
    "LayerAdvice",
    "LayerProfile",
    "SkippedLayer",
    "advice_yaml",
    "diagnose_model",
    "plot_diagnosis",
    "recommend",
]
