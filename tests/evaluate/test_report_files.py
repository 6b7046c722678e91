"""The report when files are missing, damaged, in other places, or of unusual size, and what it leaves alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
from fake_results import benchmark, model_row, write_fakes
from pages import SVG, check_page, pictures, read_page
from small_conversions import convert, heal

from attnconv.convert.writing.card import REPORT_END, REPORT_START, with_report
from attnconv.distill import plots
from attnconv.errors import DataError, OutputError
from attnconv.evaluate.report import write_report
from attnconv.evaluate.report.drawing import COLORS

pytestmark = pytest.mark.usefixtures("no_png")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A healed conversion without measurements."""
    return heal(tmp_path_factory.mktemp("converted") / "tiny-lolcats")


@pytest.fixture
def unmeasured(original, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "tiny-lolcats"))


@pytest.mark.usefixtures("no_pictures")
def test_without_measurements_the_commands_for_them_are_named(unmeasured):
    calls = []
    files = write_report(unmeasured, progress=lambda *state: calls.append(state))
    page = check_page(files.html)
    rows = page.tables["What is missing"]
    assert [row[0] for row in rows[1:]] == ["quality before and after", "speed and memory"]
    assert rows[1][1] == f"attnconv eval {unmeasured} --against BASE --suite standard"
    assert rows[2][1] == f"attnconv bench {unmeasured} --against BASE"
    # The receipt has the name alone of a folder, which leads nowhere.
    assert "BASE stands for the place of stories260K." in page.words
    titles = [text for level, text in page.headings if level == 2]
    assert titles == [
        "What was converted",
        "Healing, stage by stage",
        "What the attention did",
        "Not measured",
        "Receipt",
    ]
    assert "Perplexity, while converting" in page.words
    assert (calls[0][:2], calls[-1][:2]) == ((0, 3), (3, 3))


def test_parts_of_an_evaluation_may_be_missing(unmeasured):
    write_fakes(unmeasured / "results", bench=False)
    path = unmeasured / "results" / "eval.json"
    document = json.loads(path.read_text())
    document["base"] = None
    document["tasks"] = {name: document["tasks"][name] for name in ("piqa", "agreement")}
    for figure in document["tasks"]["piqa"]["figures"]:
        figure.update(model=None, interval=None, base=None, base_interval=None, change=None, change_interval=None)
    path.write_text(json.dumps(document))
    page = check_page(write_report(unmeasured).html)
    missing = [row[0] for row in page.tables["What is missing"][1:]]
    assert "quality of the base, to compare with" in missing
    assert "attention maps against the base's" in missing
    assert "accuracy on multiple-choice questions" not in missing
    assert page.tables["All figures"][1][:3] == ["piqa", "accuracy", "-"]


@pytest.mark.usefixtures("no_pictures")
def test_a_page_can_go_elsewhere_and_leave_the_card_alone(unmeasured, tmp_path):
    before = (unmeasured / "README.md").read_bytes()
    files = write_report(unmeasured, output=tmp_path / "deep" / "page.html", card=False)
    assert files.html == tmp_path / "deep" / "page.html"
    assert files.html.is_file()
    assert files.markdown.is_file()
    assert files.card is None
    assert (unmeasured / "README.md").read_bytes() == before
    (unmeasured / "README.md").unlink()
    assert write_report(unmeasured).card is None


@pytest.mark.usefixtures("no_pictures")
def test_pictures_that_are_no_longer_shown_go_and_others_stay(unmeasured):
    write_fakes(unmeasured / "results")
    (unmeasured / "results" / "eval.json").unlink()
    images = unmeasured / "results" / "images"
    write_report(unmeasured)
    (images / "mine.png").write_bytes(b"mine")
    assert (images / "prefill-1.png").is_file()
    (unmeasured / "results" / "bench.json").unlink()
    write_report(unmeasured)
    assert not (images / "prefill-1.png").exists()
    assert (images / "mine.png").read_bytes() == b"mine"


def test_layers_that_stay_are_shown_as_they_are(tmp_path):
    folder = convert(tmp_path / "mixed", layers="0,2", method="sliding_window", options={"window": 16})
    page = check_page(write_report(folder).html)
    rows = page.tables["Methods"]
    assert rows[1][0] == "sliding_window"
    assert rows[1][2:4] == ["0, 2", "2"]
    assert rows[2][:4] == ["unchanged", "as in the base", "1, 3-4", "3"]
    assert "In 2 of the 5 attention layers of stories260K" in page.words


def test_measurements_of_any_model_can_be_reported(tmp_path):
    write_fakes(tmp_path / "plain", name="plain", size=6)
    files = write_report(tmp_path / "plain")
    assert files.html == tmp_path / "plain" / "report.html"
    assert files.card is None
    page = check_page(files.html)
    assert page.headings[0] == (1, "plain")
    assert "What was converted" not in [text for _, text in page.headings]


def test_a_benchmark_in_which_nothing_fitted(unmeasured):
    document = benchmark(model_row("a", converted=True, digest="1"), model_row("b", converted=False, digest="2"))
    nothing = {"seconds": [], "skipped": "no room"} | dict.fromkeys(
        ("median", "low", "high", "tokens_per_second", "ms_per_token", "peak_bytes", "cache_bytes")
    )
    document["cases"] = [case | nothing for case in document["cases"]]
    (unmeasured / "results").mkdir()
    (unmeasured / "results" / "bench.json").write_text(
        json.dumps({"tool": "attnconv", "version": 1, "kind": "bench", **document})
    )
    page = check_page(write_report(unmeasured).html)
    assert {row[-1] for row in page.tables["All measurements"][1:]} == {"no room"}


DAMAGE = {
    "results/eval.json": [lambda text: text[:-20], lambda text: text.replace('"count": 36', '"count": "many"')],
    "results/bench.json": [lambda text: "[]", lambda text: text.replace('"role": "model"', '"role": "nobody"')],
    "receipt.json": [lambda text: text.replace('"versions"', '"versions": 3, "x"')],
    "metrics.jsonl": [lambda text: "{" + text, lambda text: text.replace('"step"', '"stop"')],
    "config.json": [lambda text: text[:-20], lambda text: text.replace('"method": "lolcats"', '"method": "none"')],
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name, found in DAMAGE.items() for damage in found])
def test_damaged_files_are_named(unmeasured, name, damage):
    write_fakes(unmeasured / "results")
    path = unmeasured / name
    path.write_text(damage(path.read_text()))
    before = (unmeasured / "README.md").read_bytes()
    with pytest.raises(DataError, match=re.escape(name)) as raised:
        write_report(unmeasured)
    assert len(str(raised.value).splitlines()) == 1
    assert (unmeasured / "README.md").read_bytes() == before
    assert not (unmeasured / "results" / "report.html").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_torn_last_line_of_metrics_is_left_out(unmeasured):
    path = unmeasured / "metrics.jsonl"
    count = len(path.read_text().splitlines())
    path.write_text(path.read_text() + '{"index": 1, "st')
    page = read_page(write_report(unmeasured).html)
    assert len(page.tables["Every line of metrics.jsonl"]) == count + 1


def test_a_place_that_cannot_be_written_is_said(unmeasured):
    (unmeasured / "results").write_text("a file")
    with pytest.raises(OutputError, match="results.*cannot be written"):
        write_report(unmeasured)


def test_many_heads_and_long_names_keep_their_place(unmeasured):
    config = json.loads((unmeasured / "config.json").read_text())
    config["num_attention_heads"], config["num_hidden_layers"] = 64, 80
    (unmeasured / "config.json").write_text(json.dumps(config))
    write_fakes(unmeasured / "results", name="n" * 60, bench=False, size=6)
    path = unmeasured / "results" / "eval.json"
    path.write_text(path.read_text().replace('"openbookqa": {', '"' + "long " * 20 + '$x$": {', 1))
    page = write_report(unmeasured).html
    check_page(page)
    strip, *others = pictures(page)
    texts = [text.text for picture in others for text in picture.iter(f"{SVG}text") if text.text]
    assert "64 heads" in [text.text for text in strip.iter(f"{SVG}text")]
    long = [text for text in texts if text.startswith("long") and "…" in text]
    assert long
    assert max(map(len, long)) <= 44


def test_what_is_no_conversion_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither a conversion nor measurements"):
        write_report(tmp_path)


def test_a_section_replaces_itself_in_a_card():
    card = "---\ntags: [a]\n---\n\n# Name\n\ntext\r\n\n## How it was made\n\nwith care\n"
    once = with_report(card, "## One\n")
    twice = with_report(once, "## Two")
    assert once.replace(f"{REPORT_START}\n## One\n{REPORT_END}\n\n", "") == card
    assert twice == once.replace("One", "Two")
    assert with_report("# Short\n", "x").startswith("# Short\n\n<!--")
    for broken in (REPORT_START, REPORT_END, f"{REPORT_END}{REPORT_START}", once + once):
        with pytest.raises(ValueError, match="once each"):
            with_report(broken, "x")


@pytest.mark.usefixtures("no_pictures")
def test_a_card_with_half_a_marker_is_said_and_kept(unmeasured):
    card = unmeasured / "README.md"
    card.write_text(card.read_text() + REPORT_START)
    with pytest.raises(DataError, match="README.md"):
        write_report(unmeasured)
    assert not (unmeasured / "results").exists()


def test_charts_have_the_colours_of_the_pictures_of_a_run():
    assert COLORS == plots.COLORS
