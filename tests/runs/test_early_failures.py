"""What could not be saved, or not be trained in a later stage, is said before anything is trained."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from attnconv.distill import training
from attnconv.errors import OutputError, PlanError, RecipeError, TrainingError
from attnconv.runs import run_conversion

LORA = "stages=[{kind: lora, steps: 1, sequence_length: 16, learning_rate: 1e-3, rank: %s, targets: [%s]}]"


@pytest.fixture
def no_training(monkeypatch):
    """Fails the test where a run gets as far as training."""

    def trained(*args):
        pytest.fail("the run trained before it failed")

    monkeypatch.setattr(training, "_step", trained)


def test_a_mount_point_is_refused_before_training(base, recipe, tmp_path, no_training, monkeypatch):
    (tmp_path / "out").mkdir()

    def busy(path, target):
        if path != tmp_path / "out":
            return rename(path, target)
        raise OSError(errno.EBUSY, "Device or resource busy")

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OutputError, match="replaced as a whole .it is a mount point.: give a folder"):
        run_conversion(base, recipe("stages.0.save_every=null"), tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_real_mount_point_is_noticed(tmp_path, repository):
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    code = f"""
import sys
sys.path.insert(0, {str(repository / ".dev")!r})
from attnconv.files.output_folder import trial_folder
try:
    with trial_folder("{tmp_path}/out") as folder:
        (folder / "file").touch()
except OSError as error:
    print(error)
"""
    script = f'mkdir -p {tmp_path}/out {tmp_path}/in && mount --bind {tmp_path}/in {tmp_path}/out && "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, sys.executable, code], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 and not done.stdout:
        pytest.skip(f"no mounts can be made here: {done.stderr.strip()[-80:]}")
    assert "it is a mount point" in done.stdout


def test_a_model_that_cannot_be_saved_is_not_trained(base, recipe, tmp_path, no_training, monkeypatch):
    def refuse(self, *args, **options):
        raise ValueError("GenerationConfig is invalid\nand more")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", refuse)
    with pytest.raises(OutputError, match="could not be saved after its healing: GenerationConfig is invalid$"):
        run_conversion(base, recipe(), tmp_path / "out", device="cpu")


def test_a_base_with_output_attentions_is_refused(base, recipe, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "output_attentions": True}))
    with pytest.raises(PlanError, match="sets output_attentions, which only eager softmax attention"):
        run_conversion(base, recipe(), tmp_path / "out", device="cpu")


def test_shards_may_be_given_in_bytes(base, recipe, tmp_path):
    run_conversion(base, recipe("output.shard_size=500000B"), tmp_path / "out", device="cpu")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_all_linear_trains_every_projection_and_nothing_else(base, recipe, tmp_path):
    chosen = recipe(LORA % (2, "all-linear"), "output.merge_lora=false")
    run_conversion(base, chosen, tmp_path / "out", device="cpu")
    with safe_open(tmp_path / "out" / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in file.keys()}  # noqa: SIM118
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_rank_beyond_the_layers_is_refused_before_training(base, recipe, tmp_path, no_training):
    with pytest.raises(TrainingError, match=r"rank 1000000000 is more than the 64 that its largest layer in q_proj"):
        run_conversion(base, recipe(LORA % ("1e9", "q_proj")), tmp_path / "out", device="cpu")


@pytest.mark.parametrize("rate", ["1e300", "1001", "1e-300"])
def test_learning_rates_out_of_range_are_refused(recipe, rate):
    with pytest.raises(RecipeError, match="learning_rate"):
        recipe(f"stages.0.learning_rate={rate}")
