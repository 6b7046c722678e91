"""Conversions side by side: one base, the same items, and a picture of quality against speed."""

import json
import re
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from browser import visit
from fake_results import ACCURACY, PERPLEXITY, choice_items, text_items, write_fakes
from hypothesis import given
from hypothesis import strategies as st
from pages import SVG, check_page, pictures, read_page

from attnconv.errors import DataError
from attnconv.evaluate.engine.bootstrap import make_figures
from attnconv.evaluate.report import compare_conversions
from attnconv.evaluate.report.charts import Axis
from attnconv.evaluate.report.drawing import drawing_style
from attnconv.evaluate.report.pareto import Point, front, pareto_chart
from attnconv.recipes import Recipe
from attnconv.runs import embedded_model_path, run_conversion

MODELS = {
    "near": {"loss": 0.1, "slope": 1.9},
    "middle": {"loss": 0.3, "slope": 1.0},
    "poor": {"loss": 0.6, "slope": 1.3},
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A conversion without healing or measurements."""
    recipe = Recipe(name="tiny", attention=[{"layers": "0-2", "method": "sliding_window", "options": {"window": 16}}])
    return run_conversion(embedded_model_path(), recipe, tmp_path_factory.mktemp("one") / "tiny", device="cpu").output


@pytest.fixture
def make(converted, no_png, tmp_path):
    """Copies of the conversion with made-up measurements of their own."""

    def copy(name, *, measured=True, **settings):
        folder = tmp_path / name
        shutil.copytree(converted, folder)
        if measured:
            write_fakes(folder / "results", name=name, **settings)
        return folder

    return copy


@pytest.fixture(scope="module")
def found(converted, tmp_path_factory):
    """Three conversions compared."""
    root = tmp_path_factory.mktemp("three")
    for seed, (name, settings) in enumerate(MODELS.items()):
        shutil.copytree(converted, root / name)
        write_fakes(root / name / "results", name=name, seed=11 + seed, **settings)
    return compare_conversions([root / name for name in MODELS], output=root / "out")


def edit(folder, kind, change):
    path = folder / "results" / f"{kind}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_the_rows_hold_what_the_folders_say(found):
    assert [row.name for row in found.rows] == ["stories260K", *MODELS]
    assert found.rows[0].folder is None
    assert found.rows[1].methods == {"sliding_window": 3}
    assert found.rows[1].parameters == 0
    keys = ["book: perplexity", "passkey: recall", "piqa: accuracy", "openbookqa: accuracy", "copy: written answers"]
    keys.append("agreement: KL divergence")
    assert [column.key for column in found.columns] == [*keys, "decode", "prefill", "cache"]
    assert found.context == 8192
    for row in found.rows[1:]:
        figure = json.loads((Path(row.folder) / "results" / "eval.json").read_text())["tasks"]["book"]["figures"][0]
        assert row.values["book: perplexity"].value == figure["model"]
        assert row.values["book: perplexity"].interval == tuple(figure["interval"])
        assert row.values["decode"].value == 9.0 * MODELS[row.name]["slope"]
        assert row.values["prefill"].value == pytest.approx(MODELS[row.name]["slope"] * 8192 / 1500)
        assert row.values["cache"].value == 6_500_000
        assert found.rows[0].values["book: perplexity"].value == figure["base"]
    assert "agreement: KL divergence" not in found.rows[0].values
    assert found.rows[0].values["cache"].value == 8192 * 23_040


def test_differences_are_those_of_the_same_items(found):
    by_model = {row.name: row for row in found.differences if row.column == "book: perplexity"}
    assert set(by_model) == {"middle", "poor"}
    best = text_items(2.7 + 0.1, 11)
    (expected,) = make_figures(text_items(2.7 + 0.3, 12), best, [PERPLEXITY], [()])
    middle = by_model["middle"]
    assert (middle.best, middle.paired, middle.differs) == ("near", True, True)
    assert middle.change == pytest.approx(expected.change)
    assert middle.interval == pytest.approx(expected.change_interval)
    assert middle.interval[0] <= np.exp(0.2) <= middle.interval[1]
    piqa = {row.name: row for row in found.differences if row.column == "piqa: accuracy"}
    scores = {
        name: choice_items(0.62 - settings["loss"] / 10, 11 + n) for n, (name, settings) in enumerate(MODELS.items())
    }
    best = max(scores, key=lambda name: sum(item.values["right"] for item in scores[name]))
    for name, row in piqa.items():
        (expected,) = make_figures(scores[name], scores[best], [ACCURACY], [()])
        assert row.best == best
        assert row.interval == pytest.approx(expected.change_interval)
        assert row.differs == (not expected.change_interval[0] <= 0 <= expected.change_interval[1])


def test_the_page_shows_all_of_it(found):
    html, markdown = found.files
    page = check_page(html)
    assert page.headings[0] == (1, "3 conversions of stories260K")
    rows = next(iter(page.tables.values()))
    assert [row[0] for row in rows] == ["model", "stories260K", *MODELS]
    for row, shown in zip(found.rows, rows[1:], strict=True):
        assert shown[2] == f"{row.parameters:,}"
        assert shown[3].split(" ")[0] == f"{row.values['book: perplexity'].value:.4g}"
        assert shown[5].split(" ")[0] == f"{100 * row.values['piqa: accuracy'].value:.1f}%"
        assert shown[9].split(" ")[0] == f"{row.values['decode'].value:.4g}"
        assert shown[11] == f"{row.values['cache'].value / 2**20:.1f} MiB"
    assert "near has the best perplexity on book" in page.words
    assert "middle generates fastest, 9 ms per token" in page.words
    points = page.tables["The points"][1:]
    fronts = {(row[0].split(" ")[0], row[1]): row[4] for row in points}
    assert fronts["decoding", "poor"] == "behind it"
    assert fronts["decoding", "stories260K"] == fronts["decoding", "middle"] == "on the front"
    images = re.findall(r"\]\((images/[\w.-]+)\)", markdown.read_text())
    assert len(images) == len(pictures(html)) == 9
    assert all((markdown.parent / image).read_bytes().startswith(b"\x89PNG") for image in images)


def test_points_carry_their_names(found):
    for picture in pictures(found.files[0]):
        if "against decode" in picture.find(f"{SVG}title").text:
            assert {row.name for row in found.rows} <= {text.text for text in picture.iter(f"{SVG}text")}
            return
    pytest.fail("there is no picture of quality against decoding")


def test_it_is_plain_json(found):
    document = json.loads(json.dumps(found.to_dict()))
    assert document["rows"][2]["name"] == "middle"
    assert document["files"] == [str(path) for path in found.files]
    assert [Path(path).name for path in document["files"]] == ["compare.html", "compare.md"]


def test_without_speed_quality_is_shown_and_the_command_for_speed(make, tmp_path):
    folders = [make("a", bench=False), make("b", bench=False, loss=0.2)]
    comparison = compare_conversions(folders, output=tmp_path / "page.html")
    assert comparison.files == (tmp_path / "page.html", tmp_path / "page.md")
    assert comparison.context is None
    assert comparison.speed == ()
    page = check_page(comparison.files[0])
    assert f"attnconv bench {folders[0]} --against" in page.words
    titles = [text for level, text in page.headings if level == 2]
    assert "Quality" in titles
    assert "Quality against speed" not in titles


def test_speed_alone_can_be_compared(make, tmp_path):
    folders = [make("a"), make("b", slope=2.0)]
    for folder in folders:
        (folder / "results" / "eval.json").unlink()
    comparison = compare_conversions(folders, output=tmp_path)
    assert comparison.quality == ()
    assert comparison.rows[2].values["decode"].value == 18.0
    check_page(comparison.files[0])


@pytest.mark.usefixtures("no_pictures")
def test_the_longest_context_that_all_have_counts(make, tmp_path):
    folders = [make("a"), make("b")]
    edit(folders[1], "bench", lambda d: d.update(cases=[case for case in d["cases"] if case["context"] <= 2048]))
    comparison = compare_conversions(folders, output=tmp_path)
    assert comparison.context == 2048
    assert {row.values["decode"].value for row in comparison.rows[1:]} == {9.0}
    assert comparison.rows[0].values["decode"].value == pytest.approx(6 + 2048 / 400)


@pytest.mark.usefixtures("no_pictures")
def test_other_settings_and_machines_are_said_and_not_paired(make, tmp_path):
    folders = [make("a"), make("b", loss=0.1)]
    edit(folders[1], "eval", lambda d: d["tasks"]["piqa"].update(limit=100))
    edit(folders[1], "bench", lambda d: d["setup"].update(threads=8))
    comparison = compare_conversions(folders, output=tmp_path)
    assert "Measured with different settings, so not comparable: piqa." in comparison.remarks
    assert any("different machines" in remark for remark in comparison.remarks)
    assert "piqa: accuracy" not in {row.column for row in comparison.differences}
    assert "book: perplexity" in {row.column for row in comparison.differences}


def test_quality_can_be_judged_by_another_metric(make, tmp_path):
    folders = [make("a"), make("b", loss=0.1)]
    comparison = compare_conversions(folders, output=tmp_path, metric="passkey: recall")
    titles = [picture.find(f"{SVG}title").text for picture in pictures(comparison.files[0])]
    assert "passkey: recall against decode" in titles
    with pytest.raises(DataError, match="no metric 'taste'.*book: perplexity"):
        compare_conversions(folders, output=tmp_path, metric="taste")


@pytest.mark.usefixtures("no_pictures")
def test_names_tell_folders_apart(make, tmp_path):
    folders = [make("one/model"), make("two/model", loss=0.1)]
    assert [row.name for row in compare_conversions(folders, output=tmp_path).rows[1:]] == ["one/model", "two/model"]


def test_what_cannot_be_compared_is_said(make, tmp_path):
    folder, bare = make("a"), make("bare", measured=False)
    with pytest.raises(DataError, match="two folders or more"):
        compare_conversions([folder])
    with pytest.raises(DataError, match="given twice"):
        compare_conversions([folder, folder / ".." / "a"])
    with pytest.raises(DataError, match=rf"{bare} has no measurements: run `attnconv eval .*attnconv bench"):
        compare_conversions([folder, bare], output=tmp_path)
    other = make("other")
    receipt = json.loads((other / "receipt.json").read_text())
    receipt["inputs"], receipt["repo_id"] = {"model.safetensors": "xxh3_128:other"}, "org/other"
    (other / "receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(DataError, match=r"not of one base.*a is of stories260K, .*other of org/other"):
        compare_conversions([folder, other], output=tmp_path)
    with pytest.raises(DataError, match="not of one base"):
        compare_conversions([folder, make("against", digest="cafe")], output=tmp_path)
    assert not (tmp_path / "compare.html").exists()


points = st.builds(
    Point, st.just(""), st.floats(1, 100).map(lambda x: round(x)), st.floats(1, 100).map(lambda x: round(x))
)


@given(st.lists(points, min_size=1, max_size=12), st.sampled_from(["lower", "higher"]))
def test_the_front_is_what_nothing_beats(found, better):
    sign = 1 if better == "lower" else -1
    best = front(found, better=better)
    assert best == sorted(best, key=lambda point: point.cost)
    for point in found:
        beaten = any(
            other.cost <= point.cost
            and sign * other.quality <= sign * point.quality
            and (other.cost, other.quality) != (point.cost, point.quality)
            for other in found
        )
        assert (point in best) == (not beaten)


def test_names_beside_points_do_not_overlap():
    """Points as close as those of real conversions."""
    places = [(26.5, 13.7), (9, 19.47), (12.15, 17), (9.9, 19.45), (7.2, 24.7), (17.1, 14.9)]
    names = [
        "smollm2-base",
        "smollm2-lolcats-64",
        "smollm2-lolcats-128",
        "smollm2-window",
        "smollm2-hedgehog",
        "hybrid",
    ]
    crowd = [Point(name, *place) for name, place in zip(names, places, strict=True)]
    with drawing_style():
        figure = pareto_chart(crowd, x=Axis("cost", log=True), y=Axis("quality", log=True), better="lower")
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(names)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


LOOK = "return {width: document.documentElement.scrollWidth, window: innerWidth};"


@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(360, 800, "dark"), pytest.param(1280, 900, "light", marks=pytest.mark.slow)]
)
def test_a_browser_shows_it_on_phones_and_desks(found, tmp_path, width, height, scheme):
    seen = visit(found.files[0], LOOK, width=width, height=height, scheme=scheme, profile=tmp_path)
    assert seen.console == []
    assert seen.answer["width"] <= seen.answer["window"] == width


def test_the_table_sorts_by_numbers(found):
    values = read_page(found.files[0]).attributes("data-value")
    perplexities = [row.values["book: perplexity"].value for row in found.rows]
    assert {str(value) for value in perplexities} <= {value for _, value in values}
