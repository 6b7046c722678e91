"""Routers fitted in closed form."""

import pytest
import torch
from transformers import AutoModel, BertConfig, GPT2Config, ViTConfig

from attnconv.convert import convert_model
from attnconv.distill.batches import Batch, ImageBatch
from attnconv.distill.logits import LogitDistillation
from attnconv.distill.routers import RouterFit
from attnconv.distill.team import find_team
from attnconv.distill.trainee import Trainee
from attnconv.errors import TrainingError
from attnconv.evaluate import perplexity
from attnconv.packaged.model import embedded_model_path, embedded_tokens
from attnconv.recipes import parse_recipe
from attnconv.recipes.stages.calibrate import CalibrateStage
from attnconv.recipes.stages.logits import LogitsStage
from attnconv.runs import run_conversion

STAGE = CalibrateStage(steps=1, sequence_length=48)


@pytest.mark.parametrize("unit", ["head", "group"])
def test_it_is_the_ridge_regression_of_what_heads_contribute(make_trainee, padded_batch, single_rows, unit):
    """Padding is absent: the rows one by one give the same."""
    trainee = make_trainee("moh", unit=unit, active=1)
    name, core = next(iter(trainee.cores().items()))
    sums = []
    for batches in ([padded_batch], single_rows):
        fit = RouterFit(trainee, STAGE)
        for batch in batches:
            fit.observe(batch)
        sums.append(fit.sums[name])
    for found, wanted in zip(vars(sums[0]).values(), vars(sums[1]).values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    module = trainee.model.get_submodule(name)
    seen = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(x=kwargs["hidden_states"]), with_kwargs=True
        ),
        module.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
    ]
    with torch.no_grad(), trainee.as_teacher():
        trainee.model(**single_rows[0].inputs(torch.float32))
    for handle in handles:
        handle.remove()
    parts = module.o_proj.weight.detach().unflatten(1, (core.num_units, -1)).transpose(0, 1)
    heads = seen["heads"][0].unflatten(-1, (core.num_units, -1)).transpose(0, 1)
    lengths = (heads @ parts.transpose(1, 2)).norm(dim=-1).T
    fit = RouterFit(trainee, STAGE)
    fit.observe(single_rows[0])
    products = fit.sums[name].products
    torch.testing.assert_close(products.float(), seen["x"][0].T @ lengths, rtol=1e-3, atol=1e-3)


def test_fitted_routers_are_better_than_random_ones_and_can_be_trained(make_trainee, batch):
    trainee = make_trainee("moh", active=5)
    with pytest.raises(TrainingError, match="Put a stage calibrate before it"):
        LogitDistillation(trainee, LogitsStage(steps=1, sequence_length=48, learning_rate=1e-3), None)
    tokens = embedded_tokens("valid").flatten()[:2048]
    found = {}
    for start in ("random", "fitted"):
        if start == "random":
            for core in trainee.cores().values():
                torch.nn.init.normal_(core.routed_router)
        else:
            fit = RouterFit(trainee, STAGE)
            for rows in embedded_tokens("train")[:12, :64].split(4):
                fit.observe(Batch(rows))
            fit.settle(find_team("cpu"))
        found[start] = perplexity(trainee.model, tokens, context=256).perplexity
    assert found["fitted"] < 0.9 * found["random"]
    LogitDistillation(trainee, LogitsStage(steps=1, sequence_length=48, learning_rate=1e-3), None)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_output_projections_are_found_whatever_they_are_called(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config, batch = {
        "bert": (BertConfig(vocab_size=64, **sizes), Batch(torch.arange(20).view(2, 10))),
        "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), Batch(torch.arange(20).view(2, 10))),
        "vit": (ViTConfig(image_size=16, patch_size=4, **sizes), ImageBatch(pixel_values=torch.randn(2, 3, 16, 16))),
    }[kind]
    trainee = Trainee(convert_model(AutoModel.from_config(config), "moh", active=2))
    fit = RouterFit(trainee, STAGE)
    fit.observe(batch)
    fit.settle(find_team("cpu"))
    assert all(core.tie is None for core in trainee.cores().values())


def test_without_a_router_there_is_nothing_to_fit(make_trainee):
    with pytest.raises(TrainingError, match="it is for 'moh' with router: linear, and for 'shrp'"):
        RouterFit(make_trainee(), STAGE)


def test_a_run_calibrates_then_trains(tmp_path):
    text = """
name: a
attention: [{layers: all, method: moh, options: {active: 6}}]
data: {embedded: true}
stages:
  - {kind: calibrate, tokens: 512, sequence_length: 64, batch_size: 2}
  - {kind: logits, steps: 1, sequence_length: 64, learning_rate: 1.0e-3, balance: 0.01}
"""
    result = run_conversion(embedded_model_path(), parse_recipe(text), tmp_path / "out")
    stages = {row["stage"]: row for row in result.metrics}
    assert stages["calibrate"]["tokens"] == 512
    # It is told how fast they went by: no machine observes a billion tokens a second.
    assert 0 < stages["calibrate"]["tokens_per_second"] < 1e9
    assert "loss" in stages["logits"]
