"""What is looked at before anything slow begins: the data of the stages, and the lengths of their sequences."""

from ..errors import TrainingError
from .health import warn_about_lengths
from .run import Run
from .training import stage_name


def check_data(run: Run) -> None:
    """Make the first sequence of every stage, so that bad data are known before anything slow begins.

    Raises:
        DataError: the data of a stage, or those for evaluation, cannot be used.
        TrainingError: the model is not one that continues text, or the processes leave a stage too few steps.
    """
    if run.checkpoint.config.is_encoder_decoder:
        raise TrainingError(
            f"{run.checkpoint.source} is an encoder-decoder, which no stage can train: use a recipe without."
        )
    positions = getattr(run.checkpoint.config.get_text_config(), "max_position_embeddings", None)
    stages = {stage_name(index, stage): stage for index, stage in enumerate(run.recipe.stages)}
    for name, stage in stages.items():
        steps = stage.steps_of(run.team.size)
        if steps < len(stage.lengths):
            raise TrainingError(
                f"{name} has fewer steps ({steps}) for {run.team.size} processes than the {len(stage.lengths)} lengths "
                "of its sequence_length: give it more tokens, or fewer lengths"
            )
        next(run.stream(stage).sequences(stage.longest))
    if run.team.leads:
        warn_about_lengths({name: stage.longest for name, stage in stages.items()}, positions)
    _ = run.evaluation_tokens, run.novel
