"""Two runs into one output, and what a run leaves that was killed between two of its steps."""

import pytest

from attnconv.distill import training
from attnconv.distill.progress import Silent
from attnconv.distill.work_folder import WorkFolder
from attnconv.errors import OutputError, TrainingError
from attnconv.runs import conversion, run_conversion


class Killed(BaseException):
    """Stands for a SIGKILL: no handler of ours sees it."""


@pytest.mark.parametrize("choice", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_run_into_an_output_is_told_that_another_is_at_work(base, recipe, tmp_path, choice):
    refused = pytest.raises(OutputError, match=r"Another process is at work on .*out right now")
    with WorkFolder(tmp_path / "out").claimed(), refused:
        run_conversion(base, recipe(), tmp_path / "out", device="cpu", **choice)
    with WorkFolder(tmp_path / "out").claimed():
        pass
    assert not WorkFolder(tmp_path / "out").path.exists()


@pytest.fixture
def left_over(base, recipe, tmp_path, monkeypatch):
    """A complete output whose run was killed before it could remove its work folder."""

    def kill(folder):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", kill)
        with pytest.raises(Killed):
            run_conversion(base, recipe(), tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "config.json").is_file()
    assert WorkFolder(tmp_path / "out").exists()
    return tmp_path / "out"


def test_resuming_a_run_that_was_complete_finishes_it_off(left_over, base, recipe):
    before = (left_over / "receipt.json").read_bytes()
    result = run_conversion(base, recipe(), left_over, resume=True, device="cpu")
    assert [row["stage"] for row in result.metrics] == ["attention_transfer"]
    assert (left_over / "receipt.json").read_bytes() == before
    assert not WorkFolder(left_over).path.exists()


def test_without_resume_a_complete_output_is_an_earlier_result(left_over, base, recipe):
    with pytest.raises(OutputError, match="add --overwrite to replace this earlier result"):
        run_conversion(base, recipe(), left_over, device="cpu")
    assert not WorkFolder(left_over).path.exists()


def test_an_overwriting_run_that_was_killed_early_can_go_on(left_over, base, recipe, reach_healing, monkeypatch):
    with pytest.raises(reach_healing):
        run_conversion(base, recipe(), left_over, overwrite=True, device="cpu")
    with pytest.raises(reach_healing):
        run_conversion(base, recipe(), left_over, resume=True, device="cpu")

    def kill(run):
        raise Killed

    # So early that nothing is written yet: the same flags with --resume added begin anew.
    WorkFolder(left_over).remove()
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "check_data", kill)
        with pytest.raises(Killed):
            run_conversion(base, recipe(), left_over, overwrite=True, device="cpu")
    with pytest.raises(reach_healing):
        run_conversion(base, recipe(), left_over, overwrite=True, resume=True, device="cpu")
    with pytest.raises(TrainingError, match="go on with --resume"):
        run_conversion(base, recipe(), left_over, device="cpu")


class Visitor(Silent):
    """Somebody who puts a file where the output will be, while the run heals."""

    def __init__(self, output):
        self.output = output

    def step(self, loss, per_second):
        self.output.mkdir(exist_ok=True)
        (self.output / "notes.txt").write_text("mine")


def test_files_put_into_the_output_while_a_run_heals_cost_no_healing(base, recipe, tmp_path, monkeypatch):
    output = tmp_path / "out"
    kept = r"is not touched: .*the healing is kept: run the same command with --resume .*--resume-from .*/out and"
    with pytest.raises(OutputError, match=kept):
        run_conversion(base, recipe(), output, device="cpu", progress=Visitor(output))
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    (output / "notes.txt").unlink()

    def trained(*args):
        pytest.fail("what was healed is healed again")

    monkeypatch.setattr(training, "_step", trained)
    run_conversion(base, recipe(), tmp_path / "other", resume_from=output, device="cpu")
    assert (tmp_path / "other" / "config.json").is_file()
    assert not WorkFolder(output).path.exists()


@pytest.mark.parametrize("content", ["", "3", "[]", '{"format": 2}', '{"identity": 3, "measured": {}}', "[" * 5000])
def test_a_damaged_work_folder_can_be_started_over(base, recipe, tmp_path, reach_healing, content):
    work = WorkFolder(tmp_path / "out").path
    work.mkdir()
    (work / "run.json").write_text(content)
    with pytest.raises(TrainingError, match=r"run.json (cannot be read|is damaged); start over with --overwrite"):
        run_conversion(base, recipe(), tmp_path / "out", resume=True, device="cpu")
    with pytest.raises(TrainingError, match="go on with --resume, or start over with --overwrite"):
        run_conversion(base, recipe(), tmp_path / "out", device="cpu")
    with pytest.raises(reach_healing):
        run_conversion(base, recipe(), tmp_path / "out", overwrite=True, device="cpu")
