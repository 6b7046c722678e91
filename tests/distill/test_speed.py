"""The training step that benchmarks measure, against the step that healing takes."""

import pytest
import torch

from attnconv.distill.speed import transfer_cases
from attnconv.distill.transfer import AttentionTransfer
from attnconv.errors import TrainingError
from attnconv.evaluate.bench import run_bench
from attnconv.recipes import Recipe
from attnconv.runs import embedded_model_path, run_conversion


def test_a_step_trains_the_cores_and_leaves_nothing_behind(make_trainee, batch, monkeypatch):
    model = make_trainee().model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    gradients = []
    original = AttentionTransfer.backward

    def backward(self, *arguments):
        figures = original(self, *arguments)
        gradients.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
        return figures

    monkeypatch.setattr(AttentionTransfer, "backward", backward)
    step = transfer_cases(model)
    step(batch.input_ids)
    step(batch.input_ids)
    cores = {name for name, _ in model.named_parameters() if ".attnconv." in name}
    assert gradients == [cores, cores]
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)


def test_cores_are_trained_in_fp32(make_trainee, batch):
    model = make_trainee(dtype=torch.bfloat16).model
    transfer_cases(model)(batch.input_ids)
    dtypes = {".attnconv." in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_nothing_to_train(make_trainee):
    with pytest.raises(TrainingError, match="nothing to train"):
        transfer_cases(make_trainee("sliding_window", window=8).model)


@pytest.mark.parametrize("method", ["lolcats", "sliding_window"])
def test_in_a_benchmark(method, tmp_path):
    recipe = Recipe(
        name="test",
        attention=[{"layers": "all", "method": method, "options": {"window": 8}}],
        stages=[],
    )
    model = run_conversion(embedded_model_path(), recipe, tmp_path / "model").output
    result = run_bench(
        str(model), contexts=(8,), repeats=2, decode_tokens=1, training_contexts=(16, 32), training=transfer_cases
    )
    assert result.path == model / "results" / "bench.json"
    rows = [row for row in result.document["cases"] if row["measure"] == "transfer"]
    assert [row["context"] for row in rows] == [16, 32]
    for row in rows:
        if method == "lolcats":
            assert row["skipped"] is None
            assert len(row["seconds"]) == 2
            assert row["tokens_per_second"] > 0
        else:
            assert "nothing to train" in row["skipped"]
