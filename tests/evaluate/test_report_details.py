"""Small things of a report that a reader trips over: ties, curves of one point, counts of one, code, long tiles."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from attnconv.distill.metrics import ExpertLoad, MetricsFile, Record
from attnconv.evaluate.report import compare_conversions, write_report
from attnconv.evaluate.report.blocks import Cell, Page, Table, Text, Tiles, section
from attnconv.evaluate.report.html import render_html
from attnconv.evaluate.report.markdown import render_markdown
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import Recipe
from attnconv.runs import run_conversion

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from browser import visit
from fake_results import benchmark, model_row, write_fakes
from pages import check_page, read_page

# Pictures have tests of their own.
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    rule = {"layers": "all", "method": "sliding_window", "options": {"window": 16}}
    folder = tmp_path_factory.mktemp("one") / "tiny"
    return run_conversion(embedded_model_path(), Recipe(name="tiny", attention=[rule]), folder, device="cpu").output


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def level_bench(document):
    """The model takes exactly what its base takes."""
    base = {(case["measure"], case["context"]): case for case in document["cases"] if case["role"] == "base"}
    for case in document["cases"]:
        case.update({**base[case["measure"], case["context"]], "role": case["role"]})
    document["crossover"] = {}


def test_a_tie_is_neither_good_nor_bad(folder):
    write_fakes(folder / "results")
    edit(folder / "results" / "bench.json", level_bench)
    text = write_report(folder).html.read_text()
    tiles = [part.split(">")[0] for part in text.split('<div class="tile')[1:]]
    assert [tile.strip(' "') for tile in tiles] == ["bad", "bad", "", "", "", ""]
    assert "reading a prompt of 8,192 tokens is as fast as before" in text.lower()


def test_models_that_are_level_are_both_best_or_none(original, tmp_path):
    names = {"one": 0.1, "same": 0.1, "poor": 0.6}
    for name, loss in names.items():
        shutil.copytree(original, tmp_path / name)
        write_fakes(tmp_path / name / "results", name=name, loss=loss)
    three = compare_conversions([tmp_path / name for name in names], output=tmp_path / "three")
    text = three.files[0].read_text()
    table = text[text.index("<tbody>") : text.index("</tbody>")]
    # The base comes first.
    rows = table.split("<tr>")[2:]
    perplexity = [row.split("<td")[3].split(">")[0] for row in rows]
    assert ["good" in cell for cell in perplexity] == [True, True, False]
    assert "one and same are level in perplexity on book" in " ".join(read_page(three.files[0]).words.split())
    both = compare_conversions([tmp_path / name for name in ("one", "same")], output=tmp_path / "two")
    text = both.files[0].read_text()
    assert "good" not in text[text.index("<tbody>") : text.index("</tbody>")]


def test_one_length_makes_no_curve(folder):
    write_fakes(folder / "results", bench=False)
    model, base = model_row("a", converted=True, digest="1"), model_row("b", converted=False, digest="2")
    document = benchmark(model, base, contexts=(512,))
    document["cases"] = [case for case in document["cases"] if case["context"] == 512]
    header = {"tool": "attnconv", "version": 1, "kind": "bench"}
    (folder / "results" / "bench.json").write_text(json.dumps({**header, **document}))
    text = write_report(folder).html.read_text()
    assert "All measurements" in text
    assert "Reading a prompt</figcaption>" not in text


def test_the_load_of_experts_is_a_map_of_layers(folder):
    file = MetricsFile(folder / "metrics.jsonl")
    for step, counts in ((1, [6, 2, 0]), (2, [3, 3, 2])):
        experts = {f"layers.{layer}.gate": ExpertLoad.of(counts) for layer in range(2)}
        file.append(Record(0, "balance", step, 64 * step, 1.0, 1e-3, 0.1, 9.0, {}, experts=experts))
    text = write_report(folder).html.read_text()
    assert "Load of the experts at the beginning of the healing" in text
    assert "each of 3 experts in 2 layers; the least even layer has 51.2% of the entropy" in text
    assert "has 98.5% of the entropy" in text


def test_one_row_is_one_row():
    tables = [Table("few", ("a",), ((Cell("x"),),) * count, collapsed=True) for count in (1, 2)]
    text = render_html(Page("t", "s", (), Tiles(()), (section("a", "A", tables),), "f"))
    assert '<span class="count">1 row</span>' in text
    assert '<span class="count">2 rows</span>' in text


def test_code_in_a_text_is_code():
    words = "Run `attnconv eval <x> a_b`, then *this*; ` alone"
    page = Page("t", "s", (), Tiles(()), (section("a", "A", [Text(words)]),), "f")
    assert "Run <code>attnconv eval &lt;x&gt; a_b</code>, then *this*; ` alone" in render_html(page)
    assert r"Run `attnconv eval <x> a_b`, then \*this\*; \` alone" in render_markdown(page)[0]


def test_the_base_is_named_by_where_it_is(folder):
    write_fakes(folder / "results", bench=False)
    place = str(embedded_model_path())
    edit(folder / "results" / "eval.json", lambda document: document["base"].update(source=place))
    page = check_page(write_report(folder).html)
    assert [row[1] for row in page.tables["What is missing"][1:]][-1] == f"attnconv bench {folder} --against {place}"


TILES = """
return {over: [...document.querySelectorAll(".tile .value")].filter(e => e.scrollWidth > e.clientWidth).length,
        all: document.querySelectorAll(".tile .value").length};
"""


def test_a_browser_keeps_figures_inside_their_tiles(folder, tmp_path):
    write_fakes(folder / "results")

    def none_left(document):
        for figure in document["tasks"]["passkey"]["figures"]:
            if not figure["group"]:
                figure.update(base=1.0, model=0.0, change=-1.0)

    edit(folder / "results" / "eval.json", none_left)
    files = write_report(folder)
    assert "-100.0 pts" in files.html.read_text()
    for width in (500, 900, 1280):
        found = visit(files.html, TILES, width=width, height=900, scheme="light", profile=tmp_path / "profile").answer
        assert found == {"over": 0, "all": 6}


def test_heads_of_one_layer_that_differ_are_told_apart(tmp_path):
    full = {"layers": "1,3", "heads": "0,2", "method": "softmax"}
    whole = {"layers": "4", "method": "softmax"}
    streaming = {"layers": "all", "method": "sliding_window", "options": {"window": 16}}
    recipe = Recipe(name="mixed", attention=[full, whole, streaming])
    folder = run_conversion(embedded_model_path(), recipe, tmp_path / "mixed", device="cpu").output
    page = write_report(folder).html.read_text()
    words = " ".join(read_page(folder / "results" / "report.html").words.split())
    # Two of four in two layers, and all four of the last one.
    assert "8 of the 20 KV heads of stories260K keep their attention" in words
    assert "that of the others was replaced, 12 by sliding_window" in words
    assert (
        "5 layers of 4 KV heads, coloured by their attention: 12 KV heads sliding_window; 8 KV heads unchanged" in page
    )
    assert "KV heads 0, 2: softmax; KV heads 1, 3: sliding_window (window=16" in words
