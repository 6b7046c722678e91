"""What to do to a model, in YAML or Python: the schema and the shipped recipes."""

from .data import CalibrateSection, DataSection, EvaluateSection
from .loading import build_recipe, list_recipes, load_recipe, parse_recipe, recipe_text
from .schema import AttentionRule, OutputSection, Recipe
from .selectors import LayerSelector, parse_layers
from .stages.base import LoraPart, StageBase, TrainingStage
from .targets import Target, with_target

__all__ = [
    "AttentionRule",
    "CalibrateSection",
    "DataSection",
    "EvaluateSection",
    "LayerSelector",
    "LoraPart",
    "OutputSection",
    "Recipe",
    "StageBase",
    "Target",
    "TrainingStage",
    "build_recipe",
    "list_recipes",
    "load_recipe",
    "parse_layers",
    "parse_recipe",
    "recipe_text",
    "with_target",
]
