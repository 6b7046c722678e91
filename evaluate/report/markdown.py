"""The same page as Markdown with pictures beside it, as model cards on the Hub show it."""

import re
from collections.abc import Mapping, Sequence

from ...formats import MISSING
from .blocks import CODE_SPAN, Block, Cell, Charts, Listing, Page, Table, Text
from .drawing import drawing_style, to_png

IMAGES = "images"


def render_markdown(page: Page) -> tuple[str, Mapping[str, bytes]]:
    """The text, and the pictures that it shows by their paths relative to it."""
    with drawing_style():
        pictures = {f"{IMAGES}/{chart.id}.png": to_png(chart.draw()) for chart in page.charts}
    parts = [f"# {escape(page.title)}", *(escape(part) for part in page.summary)]
    if page.tiles.tiles:
        rows = [(tile.label, tile.value, tile.detail) for tile in page.tiles.tiles]
        parts.append(table(("", "", ""), rows))
    for part in page.sections:
        parts.append(f"## {escape(part.title)}")
        parts += [text for block in part.blocks if (text := _block(block))]
    return "\n\n".join([*parts, f"*{escape(page.footer)}*"]) + "\n", pictures


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, which are escaped."""
    lines = [columns, ["---"] * len(columns)]
    shown = [[escape(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[escape(cell) for cell in lines[0]], lines[1], *shown])


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _escape_part(text).strip()


def _escape_part(text: str) -> str:
    """The same with a space where it begins or ends with one."""
    text = re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"\s+", " ", text)


def _with_code(text: str) -> str:
    """`escape`, but for what stands between backticks, which is inert there."""
    parts = CODE_SPAN.split(text)
    return "".join(f"`{part}`" if place % 2 else _escape_part(part) for place, part in enumerate(parts)).strip()


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return _with_code(block.text)
    if isinstance(block, Listing):
        return _folded(block.caption, _fenced(block), collapsed=block.collapsed)
    if isinstance(block, Table):
        return _folded(block.caption, _table(block), collapsed=block.collapsed)
    if isinstance(block, Charts):
        shown = [f"![{escape(c.title)}: {escape(c.description)}]({IMAGES}/{c.id}.png)" for c in block.charts]
        return "\n\n".join(shown)
    return ""


def _table(block: Table) -> str:
    align = ["---:" if numeric else "---" for numeric in block.numeric]
    lines = [[escape(column) for column in block.columns], align]
    lines += [[_cell(cell) for cell in row] for row in block.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    if not cell.code:
        return escape(f"{cell.text} ({cell.note})" if cell.note not in ("", MISSING) else cell.text)
    fence = "``" if "`" in cell.text else "`"
    return f"{fence}{' '.join(cell.text.split())}{fence}".replace("|", "\\|")


def _fenced(block: Listing) -> str:
    longest = max((len(run) for run in re.findall(r"`+", block.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{block.language}\n{block.text}\n{fence}"


def _folded(caption: str, text: str, *, collapsed: bool) -> str:
    name = escape(caption)
    return f"<details><summary>{name}</summary>\n\n{text}\n\n</details>" if collapsed else f"**{name}**\n\n{text}"
