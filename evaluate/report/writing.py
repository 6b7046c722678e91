"""`attnconv report`: a conversion's folder gets its page, the page's Markdown twin, and a summary in its card."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...convert.writing.card import with_report
from ...errors import DataError, OutputError
from ...files.own_files import CARD_FILE
from ...files.whole_files import refuse_link, write_atomically
from ..engine.progress import Progress
from .gathering import Report, gather
from .html import render_html
from .markdown import IMAGES, escape, render_markdown, table
from .page import card_lines, make_page, summarize

logger = logging.getLogger(__name__)

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"


@dataclass(frozen=True)
class ReportFiles:
    """What `write_report` wrote.

    Attributes:
        html: the page.
        markdown: its twin in Markdown, with pictures in a folder beside it.
        card: the model card that got a summary; None if there is none.
    """

    html: Path
    markdown: Path
    card: Path | None


def write_report(
    folder: Path, *, output: Path | None = None, card: bool = True, progress: Progress | None = None
) -> ReportFiles:
    """Make the report of a conversion, or of any model's folder of measurements, from the files that are there.

    Args:
        folder: what `attnconv convert` wrote; or a folder with `eval.json` or `bench.json`.
        output: where the page goes; None means `results/report.html` in the folder.
        card: whether the model card gets a summary, between two markers; the rest of it stays as it is.
        progress: called with (steps done, steps in all, what is being done).

    Raises:
        DataError: there is nothing to report on, or a file is damaged.
        OutputError: a file cannot be written.
    """
    tell = progress or (lambda done, total, doing: None)
    tell(0, 3, "reading")
    report = gather(Path(folder))
    page = make_page(report)
    # All of it is made before the first file is written.
    own_card = report.folder / CARD_FILE if card and report.is_conversion else None
    new_card = None if own_card is None else _new_card(own_card, report)
    tell(1, 3, "drawing the page")
    html = render_html(page)
    tell(2, 3, "drawing pictures")
    markdown, pictures = render_markdown(page)
    paths = ReportFiles(
        Path(output).expanduser() if output is not None else report.results / HTML_FILE,
        report.results / MARKDOWN_FILE,
        own_card if new_card is not None else None,
    )
    try:
        remove_old_pictures(paths.markdown, set(pictures))
        write_page(paths.html, html, paths.markdown, markdown, pictures)
        if own_card is not None and new_card is not None:
            write_atomically(own_card, new_card.encode())
    except OSError as error:
        raise OutputError(f"{error.filename or paths.html} cannot be written: {error.strerror or error}.") from error
    tell(3, 3, "")
    return paths


def _new_card(path: Path, report: Report) -> str | None:
    """The card with the summary in it; None if there is no card."""
    if not path.is_file():
        logger.info("%s has no model card", report.folder)
        return None
    try:
        # Line ends stay as they are.
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    try:
        return with_report(text, _card_section(report))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _card_section(report: Report) -> str:
    rows = card_lines(report)
    parts = ["## Measured against the base", *(escape(part) for part in summarize(report))]
    if rows:
        parts.append(table(("", "base", "converted", "change"), rows))
    where = f"{report.results.name}/{MARKDOWN_FILE}"
    parts.append(f"Every figure with its interval, and how it was measured: [{where}]({where}).")
    return "\n\n".join(parts)


def write_page(html_path: Path, html: str, markdown_path: Path, markdown: str, pictures: Mapping[str, bytes]) -> None:
    """Write a page and its twin, each file whole or not at all; the twin after the pictures that it shows."""
    refuse_link(markdown_path.parent / IMAGES)
    write_atomically(html_path, html.encode())
    for name, content in pictures.items():
        write_atomically(markdown_path.parent / name, content)
    write_atomically(markdown_path, markdown.encode())


def remove_old_pictures(markdown: Path, current: set[str]) -> None:
    """Remove the pictures that an earlier report showed and this one does not; others' files stay."""
    if not markdown.is_file():
        return
    refuse_link(markdown.parent / IMAGES)
    earlier = markdown.read_text(encoding="utf-8", errors="replace")
    for path in (markdown.parent / IMAGES).glob("*.png"):
        name = f"{IMAGES}/{path.name}"
        if name not in current and f"({name})" in earlier:
            path.unlink()
