"""What several tests of evaluation look at, and what they need not wait for."""

import pytest

from attnconv.evaluate.diagnose import Diagnosis, diagnose_model
from attnconv.evaluate.report import html, markdown
from attnconv.packaged.model import embedded_model_path


@pytest.fixture(scope="session")
def diagnosis() -> Diagnosis:
    return diagnose_model(str(embedded_model_path()), text="book", tokens=256, context=128, window=16)


@pytest.fixture
def no_png(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that only look at a report's page: its twin's pictures, which take as long as the page, are empty."""
    monkeypatch.setattr(markdown, "to_png", lambda figure: b"")


@pytest.fixture
def no_pictures(no_png: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at texts and tables alone: charts are set up, but none is written."""
    monkeypatch.setattr(html, "to_svg", lambda figure, id, title, description: _empty_svg(id, title, description))


def _empty_svg(id: str, title: str, description: str) -> str:
    from markupsafe import escape

    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="{id}-title {id}-desc">'
        f'<title id="{id}-title">{escape(title)}</title><desc id="{id}-desc">{escape(description)}</desc>'
        '<rect style="fill: var(--text)"/></svg>'
    )
