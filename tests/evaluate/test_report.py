"""The report of a conversion: made from its files alone, complete, self-contained, and readable everywhere."""

import dataclasses
import json
import re

import pytest
from browser import screenshot, visit
from fake_results import write_fakes
from pages import SVG, check_page, pictures, read_page
from small_conversions import heal

from attnconv.convert.writing.card import REPORT_END, REPORT_START
from attnconv.evaluate.report import write_report
from attnconv.formats import ratio


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A healed conversion with measurements and a report: the files of that, and the folder."""
    folder = heal(tmp_path_factory.mktemp("measured") / "tiny-lolcats")
    write_fakes(folder / "results", name="tiny-lolcats")
    (folder / "README.before").write_bytes((folder / "README.md").read_bytes())
    return write_report(folder), folder


def evaluation_of(folder):
    return json.loads((folder / "results" / "eval.json").read_text())


def shown(value, style):
    """A number as a reader expects it, whatever the report's own code thinks."""
    if style == "percent":
        return f"{100 * value:.1f}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def test_the_page_is_whole_self_contained_and_accessible(measured):
    files, folder = measured
    assert files.html == folder / "results" / "report.html"
    page = check_page(files.html)
    titles = [text for level, text in page.headings if level == 2]
    assert titles == [
        "What was converted",
        "Quality before and after",
        "Along the context",
        "Retrieval by length and depth",
        "Healing, stage by stage",
        "Attention maps against the base",
        "What the method does, layer by layer",
        "What the attention did",
        "Speed and memory",
        "Receipt",
    ]
    assert len(pictures(files.html)) >= 20
    assert {"summary", "details", "dl", "nav", "main"} <= {tag for tag, _ in page.tags}


def test_every_figure_is_there_as_text(measured):
    files, folder = measured
    page = read_page(files.html)
    cells = {cell for rows in page.tables.values() for row in rows for cell in row}
    words = " ".join(cells)
    figures = [figure for task in evaluation_of(folder)["tasks"].values() for figure in task["figures"]]
    assert len(figures) > 60
    for figure in figures:
        for key in ("model", "base"):
            if figure[key] is not None:
                value = shown(figure[key], figure["style"])
                assert any(cell.split(" ")[0] == value for cell in cells), (figure["metric"], figure["group"], value)
        for key in ("interval", "base_interval"):
            if figure[key] is not None:
                assert " to ".join(shown(end, figure["style"]) for end in figure[key]) in words


def test_changes_carry_their_verdict(measured):
    files, folder = measured
    rows = read_page(files.html).tables["All figures"]
    assert rows[0] == ["task", "metric", "base", "converted", "change", "verdict", "wins or ties", "items"]
    by_name = {(row[0], row[1]): row for row in rows[1:]}
    figure = evaluation_of(folder)["tasks"]["book"]["figures"][0]
    assert by_name["book", "perplexity"][4].startswith(ratio(figure["change"]))
    assert by_name["book", "perplexity"][5] == "worse"
    assert by_name["openbookqa", "accuracy"][5] == "within chance"
    assert by_name["agreement", "KL divergence"][2] == "-"
    assert by_name["book", "perplexity"][6] == "-"
    (written,) = (f for f in evaluation_of(folder)["tasks"]["copy"]["figures"] if f["metric"] == "written answers")
    assert by_name["copy", "written answers"][6] == shown(written["at_least_as_good"], "percent")
    assert 0 < written["at_least_as_good"] < 1


def test_the_conversion_is_described_from_its_files(measured):
    files, folder = measured
    page = read_page(files.html)
    rows = page.tables["Methods"]
    summary = "exact softmax in a sliding window, linear attention before it, one normaliser"
    assert rows[1][:4] == ["lolcats", summary, "0-4", "5"]
    from safetensors import safe_open

    with safe_open(folder / "model-00001-of-00002.safetensors", "pt") as file:
        added = sum(file.get_tensor(name).numel() for name in file.keys() if ".attnconv." in name)  # noqa: SIM118
    assert rows[1][-1] == f"{added:,}"
    assert f"adds {added:,} parameters" in page.words
    receipt = json.loads((folder / "receipt.json").read_text())
    for text in (*receipt["inputs"].values(), receipt["created"], receipt["versions"]["torch"], receipt["command"]):
        assert text in page.words
    assert (folder / "recipe.yaml").read_text().strip() in page.words
    assert 'AutoModelForCausalLM.from_pretrained("tiny-lolcats")' in page.words


def test_healing_is_shown_stage_by_stage(measured):
    files, folder = measured
    page = read_page(files.html)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = page.tables["Every line of metrics.jsonl"][1:]
    assert [row[3] for row in rows] == [shown(record["loss"], "") for record in records]
    errors = page.tables["Output error of each layer"]
    with_layers = [record for record in records if record["layers"]]
    assert errors[0][1:] == [f"after {with_layers[place]['tokens']:,} tokens" for place in (0, -1)]
    assert [row[2] for row in errors[1:]] == [shown(value, "") for value in with_layers[-1]["layers"].values()]
    after = [row[0] for row in page.tables["Measured during the conversion"]]
    assert after == ["after", "teacher", "swap", "attention transfer", "lora"]


def test_maps_and_statistics_are_shown_whatever_they_are_called(measured):
    files, folder = measured
    page = read_page(files.html)
    extra = evaluation_of(folder)["tasks"]["fidelity"]["extras"]["model"][0]
    last = page.tables["Layer 4, head 7: all weights"][-1]
    weights = [f"{value:.2f}".lstrip("0") or "0" for value in extra["maps"][1]["student"][-1]]
    assert last[3].split() == weights
    for name in ("linear share", "density"):
        values = [row["values"] for row in extra["statistics"] if row["name"] == name]
        rows = page.tables[f"{name} of every layer"][1:]
        assert [row[1:] for row in rows] == [[f"{100 * value:.1f}%" for value in layer] for layer in values]
    assert [row[0] for row in page.tables["path_use"][1:]] == ["linear", "window"]


def test_speed_has_curves_a_crossover_and_all_cases(measured):
    files, folder = measured
    page = read_page(files.html)
    cases = json.loads((folder / "results" / "bench.json").read_text())["cases"]
    rows = page.tables["All measurements"][1:]
    assert len(rows) == len(cases)
    assert rows[-1][-1] == "it would not fit into memory"
    assert rows[-1][4] == "-"
    crossover = page.tables["From where on the converted model is ahead"][1][2]
    assert " ".join(crossover.split()) == "2,167 tokens 2,100 to 2,250"
    texts = {
        picture.find(f"{SVG}title").text: [text.text for text in picture.iter(f"{SVG}text")]
        for picture in pictures(files.html)
    }
    assert "equal at 2,167" in texts["Reading a prompt"]
    assert "equal at 1,200" in texts["Generating a token"]
    assert not any(text and text.startswith("equal") for text in texts["Memory of the cache"])
    assert "Reading a prompt of 8,192 tokens is 3.26 times faster" in page.words


def test_text_from_files_is_escaped(measured):
    files, _ = measured
    text = files.html.read_text()
    assert "A &lt;fast&gt; processor" in text
    assert "<fast>" not in text
    assert "A <fast> processor" in read_page(files.html).words
    tokens = {row[1] for row in read_page(files.html).tables["Layer 0, head 0: all weights"]}
    assert {" <b>", " &", r"\n"} <= tokens
    assert "&lt;fast>" in files.markdown.read_text()


def test_nothing_is_said_to_be_missing_when_all_is_there(measured):
    assert "missing" not in [value for _, value in read_page(measured[0].html).attributes("id")]


def test_the_markdown_twin_shows_the_same(measured):
    files, folder = measured
    text = files.markdown.read_text()
    assert files.markdown == folder / "results" / "report.md"
    page = read_page(files.html)
    assert re.findall("^## (.*)$", text, re.MULTILINE) == [title for level, title in page.headings if level == 2]
    images = re.findall(r"\]\((images/[\w.-]+)\)", text)
    assert len(images) == len(pictures(files.html))
    assert {f"images/{path.name}" for path in (folder / "results" / "images").iterdir()} == set(images)
    for image in images:
        assert (folder / "results" / image).read_bytes().startswith(b"\x89PNG")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > sum(len(rows) for rows in page.tables.values()) * 0.9
    assert not list(folder.rglob("*.tmp"))


def test_the_card_gets_a_summary_and_nothing_else_changes(measured):
    files, folder = measured
    before, after = (folder / "README.before").read_text(), files.card.read_text()
    start, end = after.index(REPORT_START), after.index(REPORT_END) + len(REPORT_END)
    assert after[:start] + after[end:].removeprefix("\n\n") == before
    inside = after[start:end]
    assert "[results/report.md](results/report.md)" in inside
    assert "| book: perplexity | 13.7 |" in inside
    assert after.index("## Measured against the base") < after.index("## How it was made")


# The page's pictures are among its bytes.
def test_a_second_report_is_the_same_to_the_byte(measured, no_png):
    files, folder = measured
    before = {path: path.read_bytes() for path in (files.html, files.markdown, files.card)}
    assert write_report(folder) == files
    assert {path: path.read_bytes() for path in before} == before


def test_the_answer_is_plain(measured):
    assert set(dataclasses.asdict(measured[0])) == {"html", "markdown", "card"}


LOOK = """
const texts = [...document.querySelectorAll("svg text")];
const size = text => parseFloat(getComputedStyle(text).fontSize)
  * text.ownerSVGElement.getBoundingClientRect().width / text.ownerSVGElement.viewBox.baseVal.width;
return {
  width: document.documentElement.scrollWidth, window: innerWidth, small: Math.min(...texts.map(size)),
  page: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(texts[0]).fill,
};
"""
SORT = """
const region = [...document.querySelectorAll("[role=region]")].find(r => r.ariaLabel === "All figures");
const read = column => [...region.querySelectorAll("tbody tr")].map(row => row.cells[column].textContent);
const buttons = [...region.querySelectorAll("thead button")];
const before = read(3);
buttons[3].click(); const up = read(3);
buttons[3].click(); const down = read(3);
const state = buttons[3].parentElement.getAttribute("aria-sort");
buttons[1].click();
return {before, up, down, state, names: read(1), cleared: buttons[3].parentElement.getAttribute("aria-sort")};
"""


# Colours do not depend on the width, nor does the layout on colours; each start of a browser takes a second.
@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(360, 800, "dark"), pytest.param(1280, 900, "light", marks=pytest.mark.slow)]
)
def test_a_browser_shows_it_on_phones_and_desks(measured, tmp_path, width, height, scheme):
    found = visit(measured[0].html, LOOK, width=width, height=height, scheme=scheme, profile=tmp_path)
    assert found.console == []
    assert found.answer["width"] <= found.answer["window"] == width
    assert found.answer["small"] >= 10
    ground, ink = (sum(map(int, re.findall(r"\d+", found.answer[key])[:3])) for key in ("page", "ink"))
    assert (ground > ink) == (scheme == "light")
    picture = tmp_path / "page.png"
    assert screenshot(measured[0].html, picture, width=width, height=height, scheme=scheme, profile=tmp_path) == []
    assert picture.stat().st_size > 10_000


def test_a_browser_sorts_tables(measured, tmp_path):
    answer = visit(measured[0].html, SORT, width=1280, height=900, scheme="light", profile=tmp_path).answer

    def value(cell):
        number = float(cell.split(" ")[0].rstrip("%").replace(",", ""))
        return number / 100 if "%" in cell.split(" ")[0] else number

    assert sorted(answer["before"]) == sorted(answer["up"])
    numbers = [value(cell) for cell in answer["up"]]
    assert numbers == sorted(numbers)
    assert answer["down"] == answer["up"][::-1]
    assert answer["state"] == "descending"
    assert answer["cleared"] is None
    assert answer["names"] == sorted(answer["names"], key=str.lower)
