"""Small conversions of the packaged model, for tests of what is made of their folders."""

from attnconv.recipes import Recipe
from attnconv.runs import embedded_model_path, run_conversion

TRANSFER = {"kind": "attention_transfer", "steps": 24, "sequence_length": 32, "batch_size": 1, "learning_rate": 1e-2}
LORA = {"kind": "lora", "steps": 12, "sequence_length": 32, "learning_rate": 1e-3, "rank": 2, "targets": ["q_proj"]}


def convert(folder, *stages, layers="all", method="lolcats", options=None, **sections):
    recipe = Recipe(
        name="tiny",
        attention=[{"layers": layers, "method": method, "options": options or {"window": 8}}],
        data={"embedded": True},
        stages=list(stages),
        **sections,
    )
    return run_conversion(embedded_model_path(), recipe, folder, device="cpu").output


def heal(folder):
    """A conversion through two stages, measured on the way; returns its folder."""
    return convert(folder, TRANSFER, LORA, evaluate={"embedded": True, "tokens": 400, "context": 64})
