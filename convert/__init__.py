"""The surgery: probe a model, plan, swap its attention, save and reload."""

# First of all: loading it registers our hooks, which import modules of this folder.
import transformers.modeling_utils  # noqa: F401

from .planning.plan import Plan, PlanEntry, make_plan
from .planning.probe import ProbedModule, probe
from .surgery.in_memory import convert_model, sparse
from .surgery.swap import apply_plan, converted_modules

__all__ = [
    "Plan",
    "PlanEntry",
    "ProbedModule",
    "apply_plan",
    "convert_model",
    "converted_modules",
    "make_plan",
    "probe",
    "sparse",
]
