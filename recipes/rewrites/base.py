"""What rewrites of a checkpoint have in common, and their registry."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ..data import CalibrateSection
from ..fields import Section
from ..kinds import Kinds

if TYPE_CHECKING:
    from ...convert.rewriting.steps import Step


class RewriteBase(Section, ABC):
    """A rewrite of the weights before anything else; files of this folder add a `kind`, and are read without torch.

    Attributes:
        kind: what the rewrite does.
    """

    # The attention method without which the result computes something else than its source.
    needs_method: ClassVar[str | None] = None

    kind: str

    @property
    def calibration(self) -> CalibrateSection | None:
        """The text that the step is to be settled on before it is carried out; None if it needs none."""
        return None

    @abstractmethod
    def step(self) -> "Step":
        """What carries it out; this is where torch is imported."""

    def step_before(self, rules: Sequence[Any]) -> "Step":
        """The same, where these attention rules follow, which may complete what the rewrite begins.

        Args:
            rules: the recipe's attention rules.
        """
        return self.step()

    def compact(self) -> dict[str, Any]:
        """As for every section, with the kind in front."""
        plain = super().compact()
        return {"kind": plain.pop("kind"), **plain}


REWRITES: Kinds[RewriteBase] = Kinds("rewrite", __package__ or "")
Rewrite = Annotated[RewriteBase, REWRITES]
