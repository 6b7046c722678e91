import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from attnconv import load_recipe, run_conversion
from attnconv.errors import CheckpointError, DataError
from attnconv.evaluate import load_tokens, perplexity
from attnconv.evaluate.engine.running import JOURNAL, run_evaluation
from attnconv.evaluate.engine.suite import Suite
from attnconv.evaluate.report.gathering import gather
from attnconv.evaluate.tasks.text import PerplexityTask

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.\n"


@pytest.fixture(scope="module")
def teacher(repository: Path) -> str:
    return str(repository / "packaged" / "assets" / "stories260K")


@pytest.fixture(scope="module")
def other(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with slightly other weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = AutoModelForCausalLM.from_pretrained(teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(STORY * 40)
    return path


@pytest.fixture
def suite(text: Path) -> Suite:
    task = {"kind": "perplexity", "data": str(text), "tokens": 768, "context": 128}
    return Suite.model_validate({"name": "own", "tasks": {"stories": task}})


def figure(document, task, metric="perplexity"):
    return next(f for f in document["tasks"][task]["figures"] if f["metric"] == metric and not f["group"])


def test_one_model(teacher: str, text: Path, suite: Suite, tmp_path: Path) -> None:
    calls = []
    found = run_evaluation(teacher, suite, output=tmp_path, batch_size=1, progress=lambda *call: calls.append(call))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokens = load_tokens(text, tokenizer, context=128, limit=768)
    expected = perplexity(model, tokens, context=128, tokenizer=tokenizer)
    row = figure(found.document, "stories")
    assert row["model"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert row["interval"][0] < row["model"] < row["interval"][1]
    assert row["base"] is None
    assert figure(found.document, "stories", "bits/char")["model"] == pytest.approx(
        expected.bits_per_character, rel=1e-6
    )
    assert found.path == tmp_path / "eval.json"
    assert json.loads(found.path.read_text()) == found.document
    assert list(tmp_path.iterdir()) == [found.path]
    assert found.document["setup"]["versions"]["torch"] == torch.__version__
    assert calls[0][2].startswith("loading")
    assert calls[-1][:2] == (768, 768)


def test_a_model_equals_itself(teacher: str, suite: Suite, tmp_path: Path) -> None:
    row = figure(run_evaluation(teacher, suite, against=teacher, output=tmp_path).document, "stories")
    assert row["paired"]
    assert row["base"] == row["model"]
    assert (row["change"], row["change_interval"]) == (1.0, [1.0, 1.0])


def test_an_interrupted_run_goes_on(
    teacher: str, other: str, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_evaluation(other, suite, against=teacher, output=tmp_path / "whole", batch_size=1).document

    def interrupt(done: int, total: int, text: str) -> None:
        if done >= 640:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_evaluation(other, suite, against=teacher, output=tmp_path / "cut", batch_size=1, progress=interrupt)
    journal = tmp_path / "cut" / JOURNAL
    assert len(journal.read_text().splitlines()) == 5
    assert not (tmp_path / "cut" / "eval.json").exists()
    # As a kill in the middle of a line leaves it.
    with journal.open("a") as file:
        file.write('{"key": "x", "va')
    measured = []
    original = PerplexityTask.measure
    monkeypatch.setattr(
        PerplexityTask,
        "measure",
        lambda self, evaluated, unit: measured.append(unit) or original(self, evaluated, unit),
    )
    found = run_evaluation(other, suite, against=teacher, output=tmp_path / "cut", batch_size=1)
    assert len(measured) == 7
    assert found.document["tasks"]["stories"]["figures"] == whole["tasks"]["stories"]["figures"]
    assert not journal.exists()


def test_other_settings_are_measured_anew(teacher: str, suite: Suite, tmp_path: Path, monkeypatch) -> None:
    def interrupt(done: int, total: int, text: str) -> None:
        if done:
            raise KeyboardInterrupt

    measured = []
    original = PerplexityTask.measure
    monkeypatch.setattr(
        PerplexityTask,
        "measure",
        lambda self, evaluated, unit: measured.append(unit) or original(self, evaluated, unit),
    )
    for options in ({}, {"dtype": "bfloat16"}, {"limit": 3}, {"restart": True}):
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(teacher, suite, output=tmp_path, batch_size=1, progress=interrupt, **options)
        assert len(measured) == 1, options
        measured.clear()


def test_other_tasks_stay_until_the_model_changes(
    teacher: str, other: str, suite: Suite, tmp_path: Path, caplog
) -> None:
    run_evaluation(teacher, suite, output=tmp_path)
    renamed = Suite.model_validate({"name": "own", "tasks": {"again": suite.tasks["stories"].model_dump()}})
    both = run_evaluation(teacher, renamed, output=tmp_path)
    assert list(both.document["tasks"]) == ["stories", "again"]
    assert both.ran == ("again",)
    against = run_evaluation(teacher, renamed, against=other, output=tmp_path)
    assert list(against.document["tasks"]) == ["stories", "again"]
    assert against.document["base"]["source"] == other
    assert not caplog.records
    replaced = run_evaluation(other, renamed, output=tmp_path)
    assert list(replaced.document["tasks"]) == ["again"]
    assert "are of another model, or of another dtype; they become eval.old.json" in caplog.text
    assert list(json.loads((tmp_path / "eval.old.json").read_text())["tasks"]) == ["stories", "again"]


def test_another_configuration_is_another_model(teacher: str, suite: Suite, tmp_path: Path, caplog) -> None:
    shutil.copytree(teacher, tmp_path / "model")
    run_evaluation(str(tmp_path / "model"), suite, output=tmp_path / "results")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.01}))
    renamed = Suite.model_validate({"name": "own", "tasks": {"again": suite.tasks["stories"].model_dump()}})
    found = run_evaluation(str(tmp_path / "model"), renamed, output=tmp_path / "results")
    assert list(found.document["tasks"]) == ["again"]
    assert "are of another model" in caplog.text


def test_a_changed_text_is_measured_anew(teacher: str, suite: Suite, text: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, text: str) -> None:
        if done:
            raise KeyboardInterrupt

    own = tmp_path / "own.txt"
    own.write_text(text.read_text())
    task = {"stories": {**suite.tasks["stories"].model_dump(), "data": str(own)}}
    changed = Suite.model_validate({"name": "own", "tasks": task})
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(teacher, changed, output=tmp_path / "cut", batch_size=1, progress=interrupt)
    own.write_text("xyz " + text.read_text())
    found = run_evaluation(teacher, changed, output=tmp_path / "cut", batch_size=1)
    whole = run_evaluation(teacher, changed, output=tmp_path / "whole", batch_size=1)
    assert figure(found.document, "stories")["model"] == figure(whole.document, "stories")["model"]


def test_what_another_run_added_stays(teacher: str, suite: Suite, tmp_path: Path) -> None:
    renamed = Suite.model_validate({"name": "own", "tasks": {"again": suite.tasks["stories"].model_dump()}})
    ran = []

    def meanwhile(done: int, total: int, text: str) -> None:
        if not ran:
            ran.append(text)
            other = run_evaluation(teacher, renamed, output=tmp_path / "other")
            (tmp_path / "results").mkdir()
            shutil.copy(other.path, tmp_path / "results" / "eval.json")

    found = run_evaluation(teacher, suite, output=tmp_path / "results", progress=meanwhile)
    assert list(found.document["tasks"]) == ["again", "stories"]


def test_tasks_that_compare_need_a_base(teacher: str, other: str, suite: Suite, text: Path, tmp_path: Path) -> None:
    task = {"kind": "agreement", "data": str(text), "tokens": 256, "context": 128}
    both = Suite.model_validate({"name": "own", "tasks": {**suite.model_dump()["tasks"], "same": task}})
    alone = run_evaluation(teacher, both, output=tmp_path / "alone")
    assert alone.ran == ("stories",)
    assert "--against" in alone.skipped["same"]
    compared = run_evaluation(other, both, against=teacher, output=tmp_path / "both")
    row = figure(compared.document, "same", "KL divergence")
    assert row["model"] > 0.001
    assert row["base"] is None


def test_a_limit_is_the_lower_one(teacher: str, text: Path, tmp_path: Path) -> None:
    task = {"kind": "perplexity", "data": str(text), "tokens": 512, "context": 128, "limit": 2}
    suite = Suite.model_validate({"name": "own", "tasks": {"a": task, "b": {**task, "limit": None}}})
    found = run_evaluation(teacher, suite, limit=3, output=tmp_path).document["tasks"]
    assert [found[name]["limit"] for name in "ab"] == [2, 3]
    assert [sum(found[name]["items"]["model"]["values"]["tokens"]) for name in "ab"] == [2 * 127, 3 * 127]


def test_other_tokens_are_not_paired(teacher: str, suite: Suite, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["Lily"])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    row = figure(run_evaluation(str(folder), suite, against=teacher, output=tmp_path / "out").document, "stories")
    assert not row["paired"]
    assert row["change_interval"] is not None


def test_refusals(teacher: str, suite: Suite, tmp_path: Path) -> None:
    bert = tmp_path / "bert"
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40)
    BertForMaskedLM(config).save_pretrained(bert)
    with pytest.raises(CheckpointError, match="BertForMaskedLM; evaluation needs a causal"):
        run_evaluation(str(bert), suite, output=tmp_path)
    with pytest.raises(DataError, match="bfloat16"):
        run_evaluation(teacher, suite, dtype="int8", output=tmp_path)
    with pytest.raises(DataError, match="no device"):
        run_evaluation(teacher, suite, device="abacus", output=tmp_path)
    with pytest.raises(DataError, match="CUDA devices"):
        run_evaluation(teacher, suite, device="cuda:99", output=tmp_path)
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(bare)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        run_evaluation(str(bare), suite, output=tmp_path)


def test_damaged_results_are_refused(teacher: str, suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(DataError, match="measure again"):
        run_evaluation(teacher, suite, output=tmp_path)


def test_a_report_says_when_results_are_of_other_weights(teacher: str, suite: Suite, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "windowed"
    run_conversion(teacher, load_recipe("sliding-window"), folder)
    found = run_evaluation(str(folder), suite)
    gather(folder)
    assert not caplog.records
    document = json.loads(found.path.read_text())
    document["model"]["digests"] = {"model.safetensors": "0"}
    found.path.write_text(json.dumps(document))
    gather(folder)
    assert "eval.json" in caplog.text
    assert "other weights" in caplog.text
