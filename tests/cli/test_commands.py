import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import attnconv
from attnconv.errors import AttnConvError, OutputError

pytestmark = pytest.mark.compat

COMMANDS = [
    ["convert"],
    ["inspect"],
    ["diagnose"],
    ["plan"],
    ["methods"],
    ["eval"],
    ["push"],
    ["demo"],
    ["doctor"],
    ["data", "score"],
    ["recipes", "list"],
    ["recipes", "show"],
    ["recipes", "copy"],
    ["recipes", "validate"],
]

Run = Callable[..., Result]


@pytest.mark.parametrize("command", [[], ["recipes"], ["data"], *COMMANDS], ids=" ".join)
def test_help_ends_with_two_examples(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    lines = [line.strip() for line in result.output.splitlines() if line.strip()]
    assert lines[-3] == "Examples"
    assert all(line.startswith(" ".join(["attnconv", *command])) for line in lines[-2:])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_examples_name_options_that_exist(run: Run, command: list[str]) -> None:
    output = run(*command, "--help").output
    options, examples = output.split("Examples")
    for word in examples.split():
        if word.startswith("--"):
            assert word in options


def test_version(run: Run) -> None:
    assert run("--version").output == f"attnconv {attnconv.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert"], "MODEL"),
        (["convert", "model"], "--recipe"),
        (["convert", "model", "-r", "lolcats"], "--output"),
        (["convert", "m", "-r", "r", "-o", "o", "--private"], "--push"),
        (["inspect", "m", "--set", "a=1"], "--recipe"),
        (["eval", "m", "--harness-path", "folder"], "--harness TASKS"),
        (["eval", "m", "--text", "t", "--tokens", "1"], "2"),
        (["eval", "m", "--text", "t", "--dtype", "int8"], "bfloat16"),
        (["methods", "lolcat"], "lolcats"),
        (["recipes", "show"], "NAME"),
        (["nonsense"], "nonsense"),
        (["--nonsense"], "nonsense"),
        (["-v", "-q", "methods"], "exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "./none", "-r", "lolcats", "-o", "out", "--set", "data={embedded: true}"], "./none"),
        (["convert", "{teacher}", "-r", "nono", "-o", "out"], "'nono'"),
        (["convert", "{teacher}", "-r", "lolcats", "-o", "out", "--set", "attention.0.method=lolcat"], "lolcat"),
        (["inspect", "./none"], "./none"),
        (["inspect", "user/name"], "user/name"),
        (["eval", "./none", "--text", "t.txt"], "./none"),
        (["eval", "{teacher}", "--text", "none.txt"], "none.txt"),
        (["push", "none", "user/name"], "none"),
        (["recipes", "show", "lolcat"], "lolcats"),
        (["recipes", "copy", "lolcat"], "lolcats"),
        (["recipes", "validate", "none.yaml"], "none.yaml"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_failures_are_one_sentence_and_exit_code_1(
    run: Run, arguments: list[str], words: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("-q", *(argument.replace("{teacher}", teacher) for argument in arguments))
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_traceback_needs_v(run: Run, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnconv.evaluate.diagnose.inspection.inspect_model", raising(AttnConvError("It broke.")))
    quiet = run("inspect", teacher)
    assert (quiet.exit_code, quiet.stderr) == (1, "Error: It broke.\n")
    loud = run("inspect", teacher, "-v")
    assert loud.exit_code == 1
    assert "Traceback" in loud.stderr
    assert loud.stderr.endswith("Error: It broke.\n")


def test_a_defect_is_a_sentence_too(run: Run, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnconv.evaluate.diagnose.inspection.inspect_model", raising(KeyError("a\nb")))
    result = run("inspect", teacher)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: Failed with KeyError:")
    assert len(result.stderr.splitlines()) == 1


def test_a_full_disk_is_said(run: Run, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnconv.runs.run_conversion", raising(OutputError("The disk is full.")))
    result = run("-q", "convert", teacher, "-r", "quickstart", "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (1, "Error: The disk is full.\n")


@pytest.mark.parametrize(("recipe", "hint"), [("quickstart", "--resume"), ("sliding-window", "")])
def test_an_interrupt_says_how_to_go_on(
    run: Run, teacher: str, tmp_path: Path, recipe: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnconv.runs.run_conversion", raising(KeyboardInterrupt()))
    result = run("-q", "convert", teacher, "-r", recipe, "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert hint in result.stderr
    assert ("--resume" in result.stderr) == bool(hint)


def test_recipes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = json.loads(run("recipes", "list", "--json").stdout)
    assert {"lolcats", "quickstart"} <= {row["name"] for row in listed}
    table = run("recipes", "list").stdout
    assert all(row["name"] in table for row in listed)
    shown = run("recipes", "show", "lolcats").stdout
    assert shown.startswith("#")
    assert run("recipes", "copy", "lolcats").exit_code == 0
    assert (tmp_path / "lolcats.yaml").read_text() == shown
    assert run("recipes", "validate", "lolcats.yaml").stdout == "lolcats.yaml: valid\n"
    again = run("recipes", "copy", "lolcats")
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    (tmp_path / "wrong.yaml").write_text("name: x\nattention: [{layers: all, method: lolcats, option: {}}]\n")
    both = run("recipes", "validate", "wrong.yaml", "lolcats.yaml")
    assert both.exit_code == 1
    assert "option" in both.stderr
    assert "lolcats.yaml: valid" in both.stdout


def test_inspect(run: Run, teacher: str) -> None:
    plain = run("inspect", teacher).stdout
    assert "model.layers.0-4.self_attn" in plain
    assert "8, 4 kv" in plain
    assert "131,072" in plain
    planned = run("inspect", teacher, "--recipe", "lolcats", "--set", "attention.0.options.window=16").stdout
    assert "window=16" in planned
    assert "5 of 5 modules" in planned
    document = json.loads(run("inspect", teacher, "-r", "sliding-window", "--json").stdout)
    assert document["num_converted"] == 5
    assert [row["tokens"] for row in document["footprints"]] == [4096, 32768, 131072]


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
def test_inspect_fails_for_a_rule_that_matches_no_layer(run: Run, teacher: str, tmp_path: Path, as_json: list) -> None:
    rules = "{layers: 'model.layer.0', method: lolcats}, {layers: all, method: sliding_window}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: mine\nattention: [{rules}]\n")
    result = run("inspect", teacher, "--recipe", recipe, *as_json)
    assert result.exit_code == 1
    sentence = "attention rule 1 (layers: model.layer.0, method: lolcats) matches none of the 5 attention layers"
    assert result.stderr == f"Error: {sentence}, which are named like model.layers.0.self_attn\n"
    assert "model.layers.0-4.self_attn" in result.stdout
    if as_json:
        assert json.loads(result.stdout)["unmatched"][0].startswith(sentence)


def test_what_is_piped_is_plain(run: Run, teacher: str) -> None:
    output = run("inspect", teacher, "--recipe", "hybrid").stdout
    assert "\x1b" not in output
    assert output.isascii()


def test_eval(run: Run, teacher: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside.\n" * 20)
    common = ["--text", text, "--tokens", "200", "--output", tmp_path / "results"]
    result = run("eval", teacher, "--against", teacher, "--context", "64", *common)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count(teacher) == 2
    assert "1.000 x" in result.stdout
    assert "loading" in result.stderr
    # The window is cut to what the model has positions for.
    document = json.loads(run("eval", teacher, *common, "--json").stdout)
    (figure,) = (row for row in document["tasks"]["text"]["figures"] if row["metric"] == "perplexity")
    assert figure["base"] is None
    stored = json.loads((tmp_path / "results" / "eval.json").read_text())
    assert sum(stored["tasks"]["text"]["items"]["model"]["values"]["tokens"]) == 199


def test_eval_says_how_to_go_on(run: Run, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("attnconv.evaluate.engine.running.load_evaluated", interrupt)
    result = run("eval", teacher, "--output", tmp_path)
    assert result.exit_code == 130
    assert "run the same command again to go on" in result.stderr


def test_eval_with_a_suite_and_a_text(run: Run, teacher: str, tmp_path: Path) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text("tasks: {tale: {kind: perplexity, data: book, tokens: 256, context: 64, buckets: [32]}}")
    text = tmp_path / "other.txt"
    text.write_text("Lily saw a big red ball. " * 20)
    result = run("eval", teacher, "--suite", suite, "--text", text, "--tokens", "100", "--output", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "position 32-64" in result.stdout
    document = json.loads((tmp_path / "eval.json").read_text())
    assert list(document["tasks"]) == ["tale", "other"]


def test_push(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def push_folder(folder: Path, repo_id: str, *, private: bool = False) -> str:
        calls.append((folder, repo_id, private))
        return f"https://hub/{repo_id}"

    monkeypatch.setattr("attnconv.convert.writing.hub.push_folder", push_folder)
    result = run("push", tmp_path, "user/name", "--private")
    assert result.exit_code == 0
    assert "https://hub/user/name" in result.stdout
    assert calls == [(tmp_path, "user/name", True)]
    monkeypatch.setattr("attnconv.convert.writing.hub.push_folder", raising(KeyboardInterrupt()))
    interrupted = run("push", tmp_path, "user/name")
    assert interrupted.exit_code == 130
    assert "attnconv push" in interrupted.stderr
