"""What to do to a model, in YAML or Python: the schema and the shipped recipes."""

from .data import DataSection, EvaluateSection
from .loading import build_recipe, list_recipes, load_recipe, parse_recipe, recipe_text
from .schema import AttentionRule, OutputSection, Recipe
from .selectors import LayerSelector, parse_layers
from .stages import (
    AttentionTransferStage,
    FeaturesStage,
    LogitsStage,
    LoraPart,
    LoraStage,
    Stage,
    StageBase,
    TransferLoss,
)

__all__ = [
    "AttentionRule",
    "AttentionTransferStage",
    "DataSection",
    "EvaluateSection",
    "FeaturesStage",
    "LayerSelector",
    "LogitsStage",
    "LoraPart",
    "LoraStage",
    "OutputSection",
    "Recipe",
    "Stage",
    "StageBase",
    "TransferLoss",
    "build_recipe",
    "list_recipes",
    "load_recipe",
    "parse_layers",
    "parse_recipe",
    "recipe_text",
]
