"""What a report consists of, before it is a page: sections of texts, tables, charts and listings."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tone = Literal["", "good", "bad"]
# What is to be typed, in a text.
CODE_SPAN = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what it says.
        value: the number it is sorted by; None sorts by the text.
        tone: whether it is good news or bad.
        code: whether it is something to type.
        note: more about it, in small print, such as an interval.
    """

    text: str
    value: float | None = None
    tone: Tone = ""
    code: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; `collapsed` hides it until it is asked for."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    collapsed: bool = False

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers, and are aligned to the right."""
        return tuple(
            any(row[index].value is not None for row in self.rows) and index > 0 for index in range(len(self.columns))
        )


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        id: unique on the page; letters, digits and dashes.
        title: printed above it.
        description: what it shows, for those who cannot see it.
        draw: makes the picture.
    """

    id: str
    title: str
    description: str
    draw: "Callable[[], Figure]"


@dataclass(frozen=True)
class Charts:
    """Pictures side by side where there is room; `paired` keeps two and two together."""

    kind: ClassVar[str] = "charts"
    charts: tuple[Chart, ...]
    paired: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph, in which backticks enclose code; `small` for remarks."""

    kind: ClassVar[str] = "text"
    text: str
    small: bool = False


@dataclass(frozen=True)
class Listing:
    """Lines of a file, a command or a program."""

    kind: ClassVar[str] = "listing"
    caption: str
    language: str
    text: str
    collapsed: bool = False


@dataclass(frozen=True)
class Tile:
    """One headline figure: what, how much it changed, and from what to what."""

    label: str
    value: str
    detail: str
    tone: Tone = ""


@dataclass(frozen=True)
class Tiles:
    """Headline figures."""

    kind: ClassVar[str] = "tiles"
    tiles: tuple[Tile, ...]


Block = Table | Charts | Text | Listing | Tiles


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading of its own."""

    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: its title.
        subtitle: a line above the title.
        summary: in plain words, what it says; a paragraph each.
        tiles: headline figures.
        sections: the rest.
        footer: where it comes from.
    """

    title: str
    subtitle: str
    summary: tuple[str, ...]
    tiles: Tiles
    sections: tuple[Section, ...]
    footer: str

    @property
    def charts(self) -> tuple[Chart, ...]:
        """All pictures, in order."""
        blocks = [block for section in self.sections for block in section.blocks]
        return tuple(chart for block in blocks if isinstance(block, Charts) for chart in block.charts)


def texts(*values: str) -> tuple[Cell, ...]:
    """Cells that are only text."""
    return tuple(Cell(value) for value in values)


def section(id: str, title: str, blocks: Sequence[Block | None]) -> Section | None:
    """A section of what there is to show; None if that is nothing."""
    shown = tuple(block for block in blocks if block is not None)
    return Section(id, title, shown) if shown else None
