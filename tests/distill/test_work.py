"""The work folder and the metrics file, and what a killed run may leave of them."""

import json

import pytest
import torch
from safetensors import SafetensorError

from attnconv.distill.metrics import MetricsFile, Record
from attnconv.distill.packing import Position
from attnconv.distill.work_folder import StageState, WorkFolder
from attnconv.errors import OutputError, TrainingError

IDENTITY = {"recipe": "aaaa", "model": "bbbb"}


@pytest.fixture
def work(tmp_path):
    folder = WorkFolder(tmp_path / "model")
    folder.begin(IDENTITY)
    return folder


def record(index, step):
    return Record(index, "lora", step, step * 10, 1.5, 1e-3, 0.1, 100.0, {"layer": 0.5})


def test_it_stands_beside_the_output(work, tmp_path):
    assert work.path == tmp_path / ".model.attnconv-work"
    assert work.exists()
    work.remove()
    assert not work.exists()


def test_a_checkpoint_comes_back_as_it_was_and_replaces_the_one_before(work):
    trained, moments = {"a": torch.randn(3)}, {"a/exp_avg": torch.randn(3), "a/step": torch.tensor(4.0)}
    assert work.latest() is None
    work.save(StageState(0, 4), {"a": torch.zeros(3)}, {})
    state = StageState(1, 2, 30, 1.5, Position(0, 7, 2))
    work.save(state, trained, moments)
    snapshot = work.latest()
    assert snapshot.state == state
    assert torch.equal(snapshot.trained["a"], trained["a"])
    assert all(torch.equal(snapshot.optimizer[name], moments[name]) for name in moments)
    assert [path.name for path in work.path.glob("checkpoint-*")] == ["checkpoint-1-2"]


def test_what_a_kill_left_half_written_does_not_count(work):
    work.save(StageState(0, 4), {"a": torch.zeros(3)}, {})
    (work.path / "checkpoint-0-8.partial").mkdir()
    (work.path / "checkpoint-0-8.partial" / "trained.safetensors").write_bytes(b"\x00")
    assert work.latest().state.step == 4
    work.save(StageState(0, 12), {"a": torch.zeros(3)}, {})
    assert work.latest().state.step == 12


def test_later_means_stage_first_then_step(work):
    for stage, step in ((0, 100), (1, 20)):
        folder = work.path / f"checkpoint-{stage}-{step}"
        work.save(StageState(stage, step), {"a": torch.zeros(1)}, {})
        assert folder.is_dir()
    assert (work.latest().state.stage, work.latest().state.step) == (1, 20)


def test_a_damaged_checkpoint_is_one_sentence(work):
    work.save(StageState(0, 4), {"a": torch.zeros(3)}, {})
    (work.path / "checkpoint-0-4" / "trained.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="is damaged: start over with --overwrite"):
        work.latest()


def test_another_identity_is_refused(work):
    work.check(IDENTITY)
    with pytest.raises(TrainingError, match="has another recipe: resume it unchanged"):
        work.check({**IDENTITY, "recipe": "cccc"})


def test_another_format_is_refused(work):
    run = json.loads((work.path / "run.json").read_text())
    (work.path / "run.json").write_text(json.dumps({**run, "format": 99}))
    with pytest.raises(TrainingError, match="another version of attnconv"):
        work.check(IDENTITY)


def test_results_are_kept(work):
    work.record("perplexity/teacher", {"perplexity": 3.6})
    work.record("x", [1])
    assert work.measured() == {"perplexity/teacher": {"perplexity": 3.6}, "x": [1]}


def test_metrics_come_back_and_can_be_cut(work):
    file = MetricsFile(work.metrics)
    lines = [record(0, 2), record(0, 4), record(1, 2), record(1, 4)]
    for line in lines:
        file.append(line)
    assert list(file.records()) == lines
    file.cut(1, 2)
    assert list(file.records()) == lines[:3]
    file.cut(0, 3)
    assert list(file.records()) == lines[:1]


def test_a_line_that_a_kill_broke_off_is_dropped_by_cutting(work):
    file = MetricsFile(work.metrics)
    file.append(record(0, 2))
    with work.metrics.open("a") as opened:
        opened.write('{"index": 0, "sta')
    assert list(file.records()) == [record(0, 2)]
    file.cut(0, 2)
    file.append(record(0, 4))
    assert list(file.records()) == [record(0, 2), record(0, 4)]


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint_before(work, monkeypatch):
    work.save(StageState(0, 4), {"a": torch.zeros(3)}, {})

    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("attnconv.distill.work_folder.save_file", full)
    with pytest.raises(OutputError, match="cannot be written: the disk is full"):
        work.save(StageState(0, 8), {"a": torch.zeros(3)}, {})
    assert work.latest().state.step == 4
