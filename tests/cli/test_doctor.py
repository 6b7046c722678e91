"""`attnconv doctor`: it is content with a sound installation, and says in one sentence what is wrong with another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from typer.testing import Result

from attnconv.attention_modules.contract import Memory
from attnconv.attention_modules.sparse.sliding_window import SlidingWindowAttention
from attnconv.attention_modules.tokens import Call
from attnconv.runs import self_check
from attnconv.runs.environment import describe_environment
from attnconv.runs.self_check import METHODS, TOLERANCE, run_self_check

pytestmark = pytest.mark.compat

Run = Callable[..., Result]
COMPARED = ["save and reload", "executed path", "cache", "greedy text", "left padding", "packed"]


@pytest.fixture
def window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One method is enough to see what becomes of a failure."""
    monkeypatch.setattr(self_check, "METHODS", {"sliding_window": {"window": 8}})


@pytest.fixture
def forgetful(window_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that keeps fewer tokens than the window looks at."""
    monkeypatch.setattr(SlidingWindowAttention, "tail_tokens", property(lambda self: 3))


def test_a_sound_installation(run: Run) -> None:
    result = run("doctor", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [(check["method"], check["name"]) for check in document["checks"]] == [
        (method, name) for method in METHODS for name in COMPARED
    ]
    assert all(check["difference"] <= TOLERANCE and check["problem"] is None for check in document["checks"])
    assert document["failed"] == 0
    assert document["environment"]["versions"]["transformers"]


def test_what_is_printed_fits_80_columns(run: Run, window_alone: None) -> None:
    result = run("doctor", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    for words in ("torch", "cpu: ", "chunk_linear", "is not a CUDA device", "sliding_window", "All is well"):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_wrong_answer_is_exit_code_1_and_one_sentence(run: Run, forgetful: None) -> None:
    result = run("-q", "doctor", "--device", "cpu")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(
        "Error: 3 of 6 checks failed; the first is cache of sliding_window on cpu: logits are"
    )
    assert "All is well" not in result.stdout
    document = json.loads(run("-q", "doctor", "--device", "cpu", "--json").stdout)
    assert document["failed"] == 3
    assert document["conclusion"].startswith("3 of 6")


def test_a_check_that_breaks_off_has_failed(window_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "converted_modules", lambda model: {})
    found = run_self_check()
    assert [check.name for check in found.failed] == COMPARED
    assert found.failed[0].problem == "RuntimeError: 0 layers were converted, and 0 came back"
    assert found.failed[1].problem == "there is no reloaded model to look at"


def test_a_method_that_computes_dense_attention_has_failed(window_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(self: SlidingWindowAttention, call: Call, memory: Memory) -> torch.Tensor:
        keys, values = (
            t.repeat_interleave(self.geometry.num_groups, 1) for t in (call.tokens.keys, call.tokens.values)
        )
        return F.scaled_dot_product_attention(call.query, keys, values, is_causal=True, scale=call.scaling)

    monkeypatch.setattr(SlidingWindowAttention, "attend_torch", dense)
    problems = {check.name: check.problem or "" for check in run_self_check().failed}
    assert "compute dense softmax attention, although their methods look at fewer tokens" in problems["executed path"]
    assert problems["executed path"].startswith("PlanError: 5 of 5 layers")


def test_no_number_is_no_small_difference(window_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_difference", lambda found, expected: float("nan"))
    failed = {check.name for check in run_self_check().failed}
    assert failed == {"save and reload", "cache", "left padding", "packed"}


def test_a_device_that_is_not_there(run: Run) -> None:
    result = run("doctor", "--device", "cuda:99")
    assert result.exit_code == 2
    assert "cuda:99" in result.stderr


def test_kernels_say_why_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"chunk_linear", "delta_rule"} <= set(describe_environment().kernels)
    monkeypatch.setattr("attnconv.attention_modules.kernels.selection.has_triton", lambda: False)
    assert describe_environment().devices[0].kernel_problem == "triton is not installed"


def test_threads_are_as_before(window_alone: None) -> None:
    before = torch.get_num_threads()
    run_self_check()
    assert torch.get_num_threads() == before


def test_whoever_reports_a_bug_is_asked_for_it(repository: Path) -> None:
    template = repository / ".github" / "ISSUE_TEMPLATE" / "bug.yml"
    if not template.is_file():
        pytest.skip("the template is in the repository alone")
    form = yaml.safe_load(template.read_text())
    assert any("attnconv doctor" in part["attributes"].get("description", "") for part in form["body"])
    assert "attnconv doctor" in (repository / "README.md").read_text()
