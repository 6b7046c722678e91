"""Keys and values kept as one latent."""

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator
from typing_extensions import Self

from ..data import CalibrateSection
from ..fields import Count, Positive
from .base import REWRITES, RewriteBase

if TYPE_CHECKING:
    from ...convert.rewriting.steps import Step


@REWRITES.register
class LatentRewrite(RewriteBase):
    """Make a Llama or Mistral a DeepSeek-V3: multi-head latent attention, with the feed-forwards as they were.

    Attributes:
        numbers: numbers of each token and layer that are cached; null = as many as before and one, which is exact.
        rotary: how many of them are rotated; null = a quarter, or all keys where `numbers` is null.
        constant: hold the norm of the latent by a bias; engines that know DeepSeek-V3 without biases need false, which
            costs much.
        key_weight: how much heavier an error in keys weighs than one in values.
        calibrate: the text on which keys and values are measured.
    """

    kind: Literal["latent"] = "latent"
    numbers: Count | None = None
    rotary: Count | None = None
    constant: bool = True
    key_weight: Positive = 3.0
    calibrate: CalibrateSection | None = None

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if self.calibrate is None and not (self.numbers is None and self.rotary is None and self.constant):
            raise ValueError("what is left out goes by what keys and values are like on a text: give calibrate")
        return self

    @property
    def calibration(self) -> CalibrateSection | None:
        return self.calibrate

    def step(self) -> "Step":
        from ...convert.rewriting.latent import Latent

        return Latent(numbers=self.numbers, rotary=self.rotary, constant=self.constant, key_weight=self.key_weight)
