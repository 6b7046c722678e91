"""What `--resume` goes on with, and what it refuses."""

import pytest

from attnconv.errors import CheckpointError, TrainingError
from attnconv.files.digests import digest_files
from attnconv.runs import run_conversion


@pytest.fixture
def begun(base, recipe, tmp_path, reach_healing):
    """The output of a run that was cut off at the beginning of its healing."""
    with pytest.raises(reach_healing):
        run_conversion(base, recipe(), tmp_path / "out", device="cpu")
    return tmp_path / "out"


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_other_weights_of_the_same_size_are_refused(base, recipe, begun):
    flip_last_byte(base / "model.safetensors")
    with pytest.raises(TrainingError, match=r"has other weights \(model\.safetensors\): resume it unchanged"):
        run_conversion(base, recipe(), begun, resume=True, device="cpu")


def test_another_text_of_the_same_size_is_refused(base, recipe, begun, text):
    text.write_text(text.read_text().replace("cat", "dog"))
    with pytest.raises(TrainingError, match=r"has other data \(.*text\.txt\)"):
        run_conversion(base, recipe(), begun, resume=True, device="cpu")


def test_another_tokenizer_is_refused(base, recipe, begun):
    path = base / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(TrainingError, match=r"has another tokenizer \(tokenizer_config\.json\)"):
        run_conversion(base, recipe(), begun, resume=True, device="cpu")


def test_another_learning_rate_is_refused_by_name(base, recipe, begun):
    with pytest.raises(TrainingError, match=r"another recipe \(it differs in stages\.0\.learning_rate\)"):
        run_conversion(base, recipe("stages.0.learning_rate=2e-3"), begun, resume=True, device="cpu")


def test_what_does_not_touch_training_may_change(base, recipe, begun, reach_healing):
    changed = recipe("stages.0.save_every=1", "stages.0.log_every=1", "output.dtype=float16", "output.shard_size=90KB")
    with pytest.raises(reach_healing):
        run_conversion(base, changed, begun, resume=True, device="cpu")


def test_another_output_may_go_on_with_a_run(base, recipe, begun, reach_healing, tmp_path):
    for origin in (begun, begun.with_name(".out.attnconv-work")):
        with pytest.raises(reach_healing):
            run_conversion(base, recipe(), tmp_path / "elsewhere", resume_from=origin, device="cpu")
    assert not list(tmp_path.glob(".elsewhere*"))
    with pytest.raises(TrainingError, match="There is no unfinished run for .*nowhere"):
        run_conversion(base, recipe(), tmp_path / "elsewhere", resume_from=tmp_path / "nowhere", device="cpu")


def test_weights_that_change_while_they_are_read_are_noticed(base, recipe, tmp_path, monkeypatch):
    from attnconv.distill import healing

    def changing(checkpoint, **options):
        flip_last_byte(base / "model.safetensors")
        return load(checkpoint, **options)

    load = healing.load_model
    monkeypatch.setattr(healing, "load_model", changing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while the run was reading it"):
        run_conversion(base, recipe(), tmp_path / "out", device="cpu")


def test_digests_tell_a_change_without_reading(text):
    read = digest_files({"text": text})
    assert read.changed() == []
    text.write_text("less")
    assert read.changed() == [text]
