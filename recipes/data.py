"""Where text and images come from: the `data` and `evaluate` sections."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from .fields import Count, CountOrZero, Section, Text, exactly_one, rising


class DataSection(Section):
    """Training text, or images for vision models; exactly one of `path`, `hub` and `embedded`.

    Attributes:
        path: a local jsonl, parquet or txt file, which may end in .gz, or a folder of images; relative to where the
            command runs.
        hub: id of a data set on the Hugging Face Hub, read as a stream.
        embedded: the sample that comes with the package.
        name: configuration of the Hub data set.
        revision: branch, tag or commit of the Hub data set; null = its newest, which a run then keeps to its end.
        split: split of the Hub data set or of the embedded sample; null = train.
        field: field of each row that holds the text.
        image_field: field of each row that holds an image, `image` for a folder; null = the data are text.
        seed: decides the order of the documents.
        boundaries: whether the documents packed into a training sequence see each other (`joined`) or each is by itself
            (`apart`), in attention and in what tokens have to predict.
    """

    path: Text | None = None
    hub: Text | None = None
    embedded: bool = False
    name: Text | None = None
    revision: Text | None = None
    split: Text | None = None
    field: Text = "text"
    image_field: Text | None = None
    seed: CountOrZero = 0
    boundaries: Literal["joined", "apart"] = "joined"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        exactly_one({"path": self.path is not None, "hub": self.hub is not None, "embedded": self.embedded})
        if self.name is not None and self.hub is None:
            raise ValueError("name is the configuration of a Hub data set and needs hub")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision is the commit of a Hub data set and needs hub")
        if self.split is not None and self.path is not None:
            raise ValueError("split belongs to hub or embedded; a file has no splits")
        if self.image_field is not None and self.embedded:
            raise ValueError("the embedded sample is text; images come from path or hub")
        return self


class CalibrateSection(DataSection):
    """Text on which a rewrite measures the model before it decides; keys as in `data`.

    Attributes:
        tokens: tokens of the text that are used.
        sequence_length: tokens of one sequence.
    """

    tokens: Count = 4096
    sequence_length: Annotated[Count, Field(ge=2)] = 1024

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        if self.image_field is not None:
            raise ValueError("a rewrite is measured on text: leave image_field out")
        return self


class EvaluateSection(Section):
    """Text on which perplexity is measured before and after each stage; exactly one of `path` and `embedded`.

    Attributes:
        path: a local txt or jsonl file, which may end in .gz.
        embedded: the validation sample that comes with the package.
        field: field of each row that holds the text.
        tokens: first tokens of the text that are used.
        context: tokens of each window.
        by_position: besides, perplexity of a packaged novel before and at the end, told apart by stretches of positions
            that end here, such as `[512, 1024, 2048, 4096]`; up to what the model has positions for.
    """

    path: Text | None = None
    embedded: bool = False
    field: Text = "text"
    tokens: Count = 5120
    context: Annotated[Count, Field(ge=2)] = 1024
    by_position: Annotated[list[Annotated[Count, Field(ge=2)]], AfterValidator(rising)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        exactly_one({"path": self.path is not None, "embedded": self.embedded})
        return self
