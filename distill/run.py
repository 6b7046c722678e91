"""What a run works on and with, and what it has measured so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ..convert.planning.plan import Plan
from ..convert.reading.checkpoint import Checkpoint
from ..errors import CheckpointError, TrainingError
from ..evaluate.engine.models import positions_of
from ..files.digests import FileDigests
from ..recipes import DataSection, Recipe, StageBase
from .data import TokenStream
from .evaluation_tokens import Novel, evaluation_tokens, novel_tokens
from .images import ImageStream
from .progress import Progress
from .team import Team
from .trackers import Trackers
from .work_folder import WorkFolder


@dataclass(frozen=True)
class Run:
    """What a run works on and with.

    Attributes:
        checkpoint: what is converted and healed, as it lies on disk; the teacher too, unless a rewrite changed it.
        plan: what is converted how.
        recipe: the recipe.
        tokenizer: the model's tokenizer or processor; None if it has none.
        team: the processes that share the run.
        work: the run's work folder.
        progress: whom to tell.
        weights: digests of its weight files, None where they are taken while the files are copied.
        measured: what was measured so far, under the names that the work folder keeps it by.
        origin: what the user named, where `checkpoint` is a rewritten form of that.
        origin_digests: digests of the weight files of everything that the rewritten form was made of.
        exactness: how far that is from the origin, for the receipt.
        differs: whether the rewritten form computes something else than the origin, which then is the teacher.
        trackers: what the lines of metrics are sent to, too.
    """

    checkpoint: Checkpoint
    plan: Plan
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase | None
    team: Team
    work: WorkFolder
    progress: Progress
    weights: FileDigests | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    origin: Checkpoint | None = None
    origin_digests: Mapping[str, str] | None = None
    exactness: Mapping[str, Any] | None = None
    differs: bool = False
    trackers: Trackers = field(default_factory=Trackers)

    @property
    def taught_by(self) -> Checkpoint | None:
        """The teacher where it is a model of its own; None where the healed model is its own teacher."""
        return self.origin if self.differs else None

    @property
    def start(self) -> str:
        """What the moment is called at which healing begins."""
        return "swap" if self.plan.converted else "rewrite" if self.differs else "teacher"

    def stream(self, stage: StageBase) -> TokenStream | ImageStream:
        """The text or images of a stage.

        Raises:
            TrainingError: the model has no tokenizer to read text with, or no image processor.
        """
        section = self._pinned(stage.data or self.recipe.data)
        if section is not None and section.image_field is not None:
            processor = getattr(self.tokenizer, "image_processor", self.tokenizer)
            if not isinstance(processor, BaseImageProcessor):
                raise TrainingError(
                    f"{self.checkpoint.source} has no image processor, so a stage cannot take images for it."
                )
            return ImageStream(section, processor)
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase) or section is None:
            raise TrainingError(f"{self.checkpoint.source} has no tokenizer, so a stage cannot read text for it.")
        return TokenStream(section, self.tokenizer)

    def _pinned(self, section: DataSection | None) -> DataSection | None:
        """A section with the commit of its Hub data set that the run began with, if that is known."""
        commit = None if section is None else self.measured.get("revisions", {}).get(section.hub)
        if section is None or commit is None or section.revision is not None:
            return section
        return section.model_copy(update={"revision": commit})

    def check_weights(self) -> None:
        """Refuse to go on with a teacher whose files are no longer those that the run began with.

        Raises:
            CheckpointError: a weight file was changed.
        """
        changed = [] if self.weights is None else self.weights.changed()
        if changed:
            raise CheckpointError(f"{changed[0]} was changed while the run was reading it: start the conversion again")

    @property
    def seed(self) -> int:
        """Of everything random that no data section decides."""
        return 0 if self.recipe.data is None else self.recipe.data.seed

    def record(self, key: str, value: Any) -> None:
        """Keep a result, JSON data, under a name; the same in every process."""
        self.measured[key] = value
        if self.team.leads and self.recipe.stages:
            self.work.record(key, value)

    @cached_property
    def evaluation_tokens(self) -> torch.Tensor | None:
        """What perplexity is measured on; None if the recipe does not ask for it."""
        section, tokenizer = self.recipe.evaluate, self._reader
        return None if section is None or tokenizer is None else evaluation_tokens(section, tokenizer)

    @cached_property
    def novel(self) -> Novel | None:
        """What perplexity by position is measured on; None if the recipe does not ask for it."""
        section, tokenizer = self.recipe.evaluate, self._reader
        if section is None or tokenizer is None or not section.by_position:
            return None
        return novel_tokens(section.by_position, tokenizer, positions_of(self.checkpoint))

    @property
    def _reader(self) -> PreTrainedTokenizerBase | None:
        if self.recipe.evaluate is None or self.tokenizer is None:
            return None
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise TrainingError(
                f"{self.checkpoint.source} reads no text, so it has no perplexity: set evaluate to null."
            )
        return self.tokenizer
