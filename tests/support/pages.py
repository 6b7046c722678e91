"""Reading pages in tests: their elements, tables and pictures."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "link", "br", "img", "hr", "input"}


@dataclass
class PageText(HTMLParser):
    """A parsed page.

    Attributes:
        tags: every start tag with its attributes.
        tables: texts of the cells of each table, by row; the caption is that of the region around it.
        headings: level and text of each heading.
        words: all text that is shown.
        broken: end tags that match no start tag.
    """

    tags: list[tuple[str, dict]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    headings: list[tuple[int, str]] = field(default_factory=list)
    words: str = ""
    broken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "div" and dict(attrs).get("role") == "region":
            self._rows = self.tables.setdefault(dict(attrs)["aria-label"], [])
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data: str) -> None:
        if set(self._open) & {"style", "script"}:
            return
        self.words += data
        if set(self._open) & {"td", "th"}:
            self._rows[-1][-1] += data
        if self._open and re.fullmatch("h[1-6]", self._open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    def attributes(self, name: str) -> list[tuple[str, str]]:
        """Tag and value of every attribute of a name."""
        return [(tag, attrs[name]) for tag, attrs in self.tags if name in attrs]


def read_page(path: Path) -> PageText:
    return _parsed(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=4)
def _parsed(text: str) -> PageText:
    page = PageText()
    page.feed(text)
    page.close()
    return page


def pictures(path: Path) -> list[ElementTree.Element]:
    """The page's SVG elements, each parsed on its own as XML."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", path.read_text("utf-8"), re.DOTALL)]


def check_page(path: Path) -> PageText:
    """What must hold for every page: well formed, self-contained, accessible, colours by name."""
    page = read_page(path)
    assert page.broken == []
    ids = [value for _, value in page.attributes("id")]
    assert len(ids) == len(set(ids))
    for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
        for tag, value in page.attributes(name):
            assert value.startswith(("#", "data:")) or tag == "a", (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", path.read_text("utf-8"))
    links = {
        value[1:] for name in ("href", "xlink:href") for _, value in page.attributes(name) if value.startswith("#")
    }
    referred = {id for _, value in page.attributes("aria-labelledby") for id in value.split()}
    assert links | referred <= set(ids)
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert ("html", "en") in page.attributes("lang")
    for picture in pictures(path):
        assert picture.get("role") == "img"
        assert picture.find(f"{SVG}title").text
        assert picture.find(f"{SVG}desc").text
        drawn = "".join(element.get("style", "") for element in picture.iter())
        assert "var(--" in drawn
        assert not re.search("#[0-9a-f]{6}", drawn)
    return page
