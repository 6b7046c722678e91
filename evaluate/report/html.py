"""A page as one HTML file that needs nothing else."""

from pathlib import Path
from typing import Any

from .blocks import CODE_SPAN, Chart, Page
from .drawing import drawing_style, to_svg

TEMPLATES = Path(__file__).parent / "templates"


def render_html(page: Page) -> str:
    """The whole page: styles, script and pictures inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code_spans"] = _code_spans
    with drawing_style():
        pictures = {chart.id: _picture(chart) for chart in page.charts}
    return environment.get_template("report.html").render(page=page, pictures=pictures)


def _code_spans(text: str) -> Any:
    """A text with what stands between backticks as code, all of it escaped."""
    from markupsafe import Markup, escape

    parts = CODE_SPAN.split(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part) for place, part in enumerate(parts)
    )


def _picture(chart: Chart) -> Any:
    from markupsafe import Markup

    # Written by an XML library, which has escaped all text in it.
    return Markup(to_svg(chart.draw(), chart.id, chart.title, chart.description))
